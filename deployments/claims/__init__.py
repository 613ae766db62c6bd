"""Claims from file to review. Pure Python: no Ray, no torch, no HTTP; the model comes in through `ReviewModel`.

One claim's way, a module a step:
    intake (x12, x12_claims, dispositions) -> model.Claim -> history -> rules -> prompt (plan) -> review_model
    -> review_schema (the answer) -> action -> reviewer (the review) -> narrative
Beside it: generate_samples and labels (synthetic claims with planted faults), scripted_model (the test double).
"""
