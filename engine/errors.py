"""Every error the engine raises on purpose.

EngineError
├── CheckpointError       a model directory or GGUF file that cannot be served (one sentence: file, fault)
├── RequestError          a request that can never be served as asked (prompt too long, bad parameter)
│   └── GrammarError      a JSON schema that cannot be compiled
├── QueueFullError        the waiting queue is at its limit; the same request may succeed later
├── PinRefused            a prefix that may not be pinned beside those that are
├── RequestStateError     a call that the request's present state does not allow
├── NativeUnavailable     the native backend cannot run this model here; the torch backend can
└── IntegrityError        an internal invariant does not hold; the engine must not go on
"""


class EngineError(Exception):
    """Base of the engine's deliberate errors."""


class CheckpointError(EngineError):
    """A model on disk that cannot be served. The message names the file and what is wrong."""


class RequestError(EngineError):
    """A request that can never be served as asked. The caller's fault: a 4xx at the edge."""


class GrammarError(RequestError):
    """A JSON schema that cannot be compiled into a decoding constraint."""


class QueueFullError(EngineError):
    """The waiting queue is at its limit. The caller may try again: a 429 or 503 at the edge."""


class PinRefused(EngineError):
    """Pinning this prefix would leave too little room for requests, or too many are pinned."""


class RequestStateError(EngineError):
    """A call that the request's present state does not allow, such as completing an aborted handoff."""


class IntegrityError(EngineError):
    """An invariant of the cache or the scheduler is broken. Fail closed."""


class NativeUnavailable(EngineError):
    """The native backend cannot run this model on this machine. The message is the reason, half a sentence."""
