/* Load-time repacking: A in an instruction set's own order, and the transposed module of the backward pass. */
#include "stages.h"

static size_t aligned(size_t bytes) { return lordba_ceil_div(bytes, LORDBA_ALIGNMENT) * LORDBA_ALIGNMENT; }

/* Bytes of A as words, which can be read up to 3 bytes too far. */
static size_t words_bytes(const lordba_module* module) {
  return (lordba_ceil_div(module->d_in, LORDBA_WORD) * lordba_padded_rank(module) + 1) * sizeof(uint32_t);
}

static lordba_module swapped(const lordba_module* module, const uint8_t* a_signs, const uint8_t* b_signs) {
  return (lordba_module){
      .r = module->r,
      .d_in = module->d_out,
      .d_out = module->d_in,
      .a_signs = a_signs,
      .b_signs = b_signs,
      .s_in = module->s_out,
      .s_mid = module->s_mid,
      .s_out = module->s_in,
  };
}

size_t lordba_prepared_size(const lordba_module* module, bool transposed) {
  if (!transposed) return aligned(words_bytes(module));
  const lordba_module back = swapped(module, NULL, NULL);
  return aligned(words_bytes(&back)) + aligned(module->r * lordba_ceil_div(back.d_in, 8)) +
         aligned(back.d_out * lordba_ceil_div(module->r, 8));
}

/* The 8 x 8 bits of a word, byte k = row k, transposed. */
static uint64_t transpose_8x8(uint64_t bits) {
  uint64_t swap = (bits ^ bits >> 7) & 0x00aa00aa00aa00aa;
  bits ^= swap ^ swap << 7;
  swap = (bits ^ bits >> 14) & 0x0000cccc0000cccc;
  bits ^= swap ^ swap << 14;
  swap = (bits ^ bits >> 28) & 0x00000000f0f0f0f0;
  return bits ^ swap ^ swap << 28;
}

/* Bits [rows][columns] in bytes become bits [columns][rows]; padding becomes zero. */
static void transpose_bits(const uint8_t* from, size_t rows, size_t columns, uint8_t* to) {
  const size_t from_bytes = lordba_ceil_div(columns, 8), to_bytes = lordba_ceil_div(rows, 8);
  for (size_t row = 0; row < rows; row += 8) {
    for (size_t column = 0; column < columns; column += 8) {
      uint64_t bits = 0;
      for (size_t k = 0; k < lordba_at_most(rows - row, 8); ++k) {
        bits |= (uint64_t)from[(row + k) * from_bytes + column / 8] << 8 * k;
      }
      bits = transpose_8x8(bits);
      for (size_t k = 0; k < lordba_at_most(columns - column, 8); ++k) {
        to[(column + k) * to_bytes + row / 8] = (uint8_t)(bits >> 8 * k);
      }
    }
  }
}

lordba_status lordba_prepare(const lordba_kernels* kernels, const lordba_module* module, bool transposed, void* memory,
                             size_t size, lordba_module* prepared) {
  if (memory == NULL || (uintptr_t)memory % LORDBA_ALIGNMENT != 0) return LORDBA_BAD_POINTER;
  if (size < lordba_prepared_size(module, transposed)) return LORDBA_SMALL_WORKSPACE;
  lordba_module result = *module;
  uint8_t* bytes = memory;
  if (transposed) {
    result = swapped(module, NULL, NULL);
    uint8_t* a = bytes + aligned(words_bytes(&result));
    uint8_t* b = a + aligned(module->r * lordba_ceil_div(module->d_out, 8));
    transpose_bits(module->b_signs, module->d_out, module->r, a);
    transpose_bits(module->a_signs, module->r, module->d_in, b);
    result = swapped(module, a, b);
  }
  uint32_t* words = memory;
  const size_t row_bytes = lordba_ceil_div(result.d_in, 8);
  result.a_words = words;
  for (size_t first = 0; first < result.d_in; first += LORDBA_CHUNK) {
    const size_t n = lordba_at_most(result.d_in - first, LORDBA_CHUNK);
    for (size_t rank = 0; rank < result.r; rank += LORDBA_MAX_RANKS) {
      const size_t rows = lordba_at_most(result.r - rank, LORDBA_MAX_RANKS);
      const size_t blocks = lordba_ceil_div(rows, LORDBA_LANES);
      kernels->pack_a(result.a_signs + rank * row_bytes + first / 8, row_bytes, rows, lordba_ceil_div(n, 8), blocks,
                      words);
      words += lordba_ceil_div(n, LORDBA_WORD) * blocks * LORDBA_LANES;
    }
  }
  *prepared = result;
  return LORDBA_OK;
}
