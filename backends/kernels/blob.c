/* Reading an adapter blob: header and records are little endian, of any alignment, and not trusted. */
#include "tiles.h"

enum { HEADER_BYTES = 32, RECORD_BYTES = 64, BLOB_VERSION = 1 };

static const uint64_t MAGIC = 0x0000414244524f4c; /* "LORDBA", little endian */

static uint64_t load_u64(const uint8_t* p) { return lordba_load_u32(p) | (uint64_t)lordba_load_u32(p + 4) << 32; }

const char* lordba_status_text(lordba_status status) {
  switch (status) {
    case LORDBA_OK:
      return "ok";
    case LORDBA_NOT_A_BLOB:
      return "not an adapter blob of a known version";
    case LORDBA_TRUNCATED:
      return "the adapter blob is truncated";
    case LORDBA_NO_SUCH_MODULE:
      return "the adapter blob holds fewer modules than the program";
    case LORDBA_BAD_RECORD:
      return "the adapter blob has a damaged record";
    case LORDBA_BAD_SIZE:
      return "modules, strides or counts that do not fit together";
    case LORDBA_BAD_POINTER:
      return "a pointer that is missing or not aligned";
    case LORDBA_BAD_DTYPE:
      return "a dtype that is none of fp32, fp16 and bf16";
    case LORDBA_SMALL_WORKSPACE:
      return "fewer bytes of memory than asked for";
  }
  return "unknown status";
}

uint64_t lordba_scale_bytes(lordba_scale_code code, uint64_t n) {
  switch (code) {
    case LORDBA_FP32:
      return 4 * n;
    case LORDBA_FP16:
      return 2 * n;
    case LORDBA_INT8:
      return 2 * sizeof(float) + n;
    case LORDBA_LOG4:
      return 16 * sizeof(float) + (n + 1) / 2;
  }
  return UINT64_MAX;
}

static lordba_scales scales_at(const uint8_t* section, lordba_scale_code code) {
  const size_t meaning = code == LORDBA_LOG4 ? 16 * sizeof(float) : code == LORDBA_INT8 ? 2 * sizeof(float) : 0;
  return (lordba_scales){code, section, section + meaning};
}

lordba_status lordba_blob_module(const void* blob, size_t size, uint64_t index, lordba_module* module) {
  const uint8_t* bytes = blob;
  if (size < HEADER_BYTES || load_u64(bytes) != MAGIC || lordba_load_u32(bytes + 8) != BLOB_VERSION) {
    return LORDBA_NOT_A_BLOB;
  }
  const uint64_t count = lordba_load_u32(bytes + 12), total = load_u64(bytes + 16);
  const uint64_t data = HEADER_BYTES + RECORD_BYTES * count;
  if (total > size || data > total) return LORDBA_TRUNCATED;
  if (index >= count) return LORDBA_NO_SUCH_MODULE;

  const uint8_t* record = bytes + HEADER_BYTES + RECORD_BYTES * index;
  const uint64_t r = lordba_load_u32(record), d_in = lordba_load_u32(record + 4), d_out = lordba_load_u32(record + 8);
  const uint32_t number = lordba_load_u32(record + 12);
  if (r == 0) {
    *module = (lordba_module){0};
    return LORDBA_OK;
  }
  if (number > LORDBA_LOG4 || d_in == 0 || d_out == 0) return LORDBA_BAD_RECORD;
  const lordba_scale_code code = (lordba_scale_code)number;
  /* 32-bit factors: none of these products overflows 64 bits. */
  const uint64_t lengths[5] = {r * ((d_in + 7) / 8), d_out * ((r + 7) / 8), lordba_scale_bytes(code, d_in),
                               lordba_scale_bytes(code, r), lordba_scale_bytes(code, d_out)};
  const uint8_t* sections[5];
  for (int i = 0; i < 5; ++i) {
    const uint64_t offset = load_u64(record + 16 + 8 * i);
    if (offset < data || offset > total) return LORDBA_BAD_RECORD;
    if (lengths[i] > total - offset) return LORDBA_TRUNCATED;
    sections[i] = bytes + offset;
  }
  *module = (lordba_module){
      .r = (uint32_t)r,
      .d_in = (uint32_t)d_in,
      .d_out = (uint32_t)d_out,
      .a_signs = sections[0],
      .b_signs = sections[1],
      .s_in = scales_at(sections[2], code),
      .s_mid = scales_at(sections[3], code),
      .s_out = scales_at(sections[4], code),
  };
  return LORDBA_OK;
}
