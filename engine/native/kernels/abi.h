// What Python and the kernels share. engine/native/abi.py mirrors these structures field by field.
//
// Letters: T rows (tokens) of a step, H hidden_size, I intermediate_size, Q query heads, G KV heads, D head_dim,
// S slots in a block, V vocabulary.
#pragma once
#include <stdint.h>

#define ZS_ABI_VERSION 2

// Weights are cut into tiles of 32 rows x 32 columns. A tile is contiguous and a multiple of 64 bytes; the
// tiles of 32 rows follow each other from the first column to the last, then come the next 32 rows. The last
// rows are padded with zeros. w[n][k] is what a tile says row n, column k of it is worth:
//
//   kind          codes                scales, after the codes            w
//   ZS_Q4_HALF    512 B, 0..15         fp16 d[32], fp16 m[32]             d[n] * code + m[n]
//   ZS_Q4_FLOAT   512 B, 0..15         fp32 d[32], fp32 m[32]             d[n] * code + m[n]
//   ZS_Q8_HALF    1024 B, 1..255       fp16 d[32]                         d[n] * (code - 128)
//   ZS_Q8_SPLIT   1024 B, 0..255       fp32 d[2][32]                      d[k / 16][n] * (code - 128)
//
// Codes: two halves of 16 rows each. 8 bits: byte (j * 16 + n) * 4 + i of a half is row n, column 4 j + i
// (j in 0..7). 4 bits: byte (j * 16 + n) * 4 + i (j in 0..3) holds column 4 j + i in its low nibble and
// column 16 + 4 j + i in its high one.
enum ZsKind { ZS_Q4_HALF = 0, ZS_Q4_FLOAT = 1, ZS_Q8_HALF = 2, ZS_Q8_SPLIT = 3 };

struct ZsMatrix {
  const uint8_t* tiles;  // 64-byte aligned; 0 where the model has no such matrix
  int32_t rows;          // without padding
  int32_t columns;       // a multiple of 32
  int32_t kind;
  int32_t reserved;
};

struct ZsLayer {
  const float* input_norm;  // (H)
  const float* mlp_norm;    // (H)
  const float* q_bias;      // (Q D) or 0
  const float* k_bias;      // (G D) or 0
  const float* v_bias;      // (G D) or 0
  const float* q_norm;      // (D) or 0
  const float* k_norm;      // (D) or 0
  ZsMatrix q, k, v, output;
  ZsMatrix gate_up;  // (2 I, H): 16 rows of gate, the same 16 of up, the next 16 of gate, ...
  ZsMatrix down;     // (H, I)
};

struct ZsModel {
  int32_t num_layers, hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, vocab_size, block_size;
  float rms_norm_eps;
  int32_t reserved;
  const float* inverse_frequencies;  // (D / 2): angle of pair i at position p is p * inverse_frequencies[i]
  const float* final_norm;           // (H)
  ZsMatrix embedding;                // (V, H)
  ZsMatrix head;                     // (V, H); the same tiles as `embedding` where they are tied
  const ZsLayer* layers;
};

struct ZsChunk {
  int32_t first_row;     // of the step's rows
  int32_t num_rows;      // at least 1
  int32_t start;         // position of the first row
  int32_t first_block;   // index into ZsStep.block_tables
};

struct ZsStep {
  int32_t num_rows;      // at most the engine's max_rows
  int32_t num_chunks;
  int32_t num_sampled;
  int32_t reserved;
  const int32_t* token_ids;     // (num_rows)
  const ZsChunk* chunks;        // rows ascending, without gaps
  const int32_t* block_tables;  // each chunk's blocks, ceil((start + num_rows) / S) of them
  const int32_t* sampled_rows;  // (num_sampled)
  float* logits;                // (num_sampled, V), 64-byte aligned not needed
};

// Bytes of one tile of a kind; 0 for an unknown kind.
extern "C" int64_t zs_tile_bytes(int32_t kind);

// An engine over one KV cache: `kv` holds blocks, each (G, layers, 2, S, D) bfloat16 (keys, then values).
// Where S is a multiple of 16 the S x D elements of keys lie as [D / 2][S][2] and those of values as [S / 2][D][2];
// for other S both lie as [S][D]. All pointers in `model` must outlive the engine.
// Returns 0 where memory is short or a size is not supported.
extern "C" void* zs_create(const ZsModel* model, void* kv, int32_t max_rows, int32_t num_threads);
extern "C" void zs_destroy(void* engine);

// Computes one step. The arguments must have been checked: block ids, token ids and rows are trusted.
extern "C" void zs_step(void* engine, const ZsStep* step);

// Bytes of scratch the engine holds; it never grows.
extern "C" int64_t zs_scratch_bytes(const void* engine);

// "avx512", "avx2" or "portable": the path this library was compiled for.
extern "C" const char* zs_path();
extern "C" int32_t zs_abi_version();

// Zeroes the engine's scratch: what a scrubbed request's activations left there goes too.
extern "C" void zs_scrub(void* engine);
