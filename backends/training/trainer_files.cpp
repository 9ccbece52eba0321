// What a trainer writes and reads: checkpoints, and the adapter as a program's runtime reads it.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "trainer.h"

namespace lordba {
namespace {

namespace fs = std::filesystem;

constexpr char kCheckpoint[8] = {'L', 'O', 'R', 'D', 'B', 'A', 'C', '\1'};
constexpr char kBlob[8] = {'L', 'O', 'R', 'D', 'B', 'A', 0, 0};

struct CheckpointHeader {
  char magic[8];
  uint64_t layout, optimizer, size, state_bytes, note_bytes, steps, digest;
};

// A hash of everything that follows the header, words at a time: finds damage, not forgery.
class Digest {
 public:
  void take(const void* data, size_t bytes) {
    const auto* p = static_cast<const uint8_t*>(data);
    for (; bytes >= 8; p += 8, bytes -= 8) {
      uint64_t word;
      std::memcpy(&word, p, 8);
      mix(word);
    }
    for (; bytes > 0; ++p, --bytes) mix(*p);
  }
  uint64_t value() const { return value_; }

 private:
  void mix(uint64_t word) {
    value_ = (value_ ^ word) * 0x9e3779b97f4a7c15;
    value_ ^= value_ >> 29;
  }
  uint64_t value_ = 0x243f6a8885a308d3;
};

// A file that appears complete or not at all, also if the machine stops: written beside, flushed, then renamed.
class NewFile {
 public:
  explicit NewFile(const std::string& path) : path_(path), temporary_(path + ".partial") {
    file_ = std::fopen(temporary_.c_str(), "wb");
    if (!file_) throw Fault(path + ": cannot be written; name a file in a folder that exists and is yours");
  }
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;
  ~NewFile() {
    if (!file_) return;
    std::fclose(file_);
    std::remove(temporary_.c_str());
  }
  void write(const void* data, size_t bytes) { good_ = good_ && std::fwrite(data, 1, bytes, file_) == bytes; }
  void finish() {
    good_ = good_ && std::fflush(file_) == 0 && fsync(fileno(file_)) == 0;
    good_ = std::fclose(file_) == 0 && good_;
    file_ = nullptr;
    if (!good_ || std::rename(temporary_.c_str(), path_.c_str()) != 0) {
      std::remove(temporary_.c_str());
      throw Fault(path_ + ": cannot be written; is the disk full?");
    }
  }

 private:
  std::string path_, temporary_;
  std::FILE* file_ = nullptr;
  bool good_ = true;
};

std::vector<uint8_t> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!fs::is_regular_file(path) || !file) throw Fault(path + ": cannot be read; name an existing file");
  return {std::istreambuf_iterator<char>(file), {}};
}

class Bytes {
 public:
  template <typename T>
  void put(T value) {
    add(&value, sizeof value);
  }
  void add(const void* data, size_t bytes) {
    const auto* p = static_cast<const uint8_t*>(data);
    bytes_.insert(bytes_.end(), p, p + bytes);
  }
  void align(size_t before) { bytes_.resize(bytes_.size() + (4 - (before + bytes_.size()) % 4) % 4); }
  size_t size() const { return bytes_.size(); }
  const uint8_t* data() const { return bytes_.data(); }

 private:
  std::vector<uint8_t> bytes_;
};

// What the codes mean, in front of them in a blob.
void put_meaning(Bytes& bytes, lordba_scale_code code, const uint16_t range[2]) {
  if (code != LORDBA_INT8 && code != LORDBA_LOG4) return;
  float levels[256];
  lordba_scale_levels(code, range, levels);
  if (code == LORDBA_LOG4) {
    bytes.add(levels, 16 * sizeof(float));
  } else {
    // From fp16 all of these are exact in double, as in lordba/blob.py.
    bytes.put(levels[1]);
    bytes.put(static_cast<float>((double{levels[255]} - levels[1]) / 254));
  }
}

}  // namespace

void Trainer::save(const std::string& file, const std::string& note) const {
  CheckpointHeader header{};
  std::memcpy(header.magic, kCheckpoint, sizeof kCheckpoint);
  header.layout = layout_hash_;
  header.optimizer = optimizer_.kind;
  header.size = latents.size();
  header.state_bytes = state_.size();
  header.note_bytes = note.size();
  header.steps = steps;
  Digest digest;
  digest.take(latents.data(), latents.size() * sizeof(float));
  digest.take(state_.data(), state_.size());
  digest.take(note.data(), note.size());
  header.digest = digest.value();
  NewFile out(file);
  out.write(&header, sizeof header);
  out.write(latents.data(), latents.size() * sizeof(float));
  out.write(state_.data(), state_.size());
  out.write(note.data(), note.size());
  out.finish();
}

std::string Trainer::load(const std::string& file) {
  std::ifstream in(file, std::ios::binary);
  CheckpointHeader header{};
  if (!in.read(reinterpret_cast<char*>(&header), sizeof header) ||
      std::memcmp(header.magic, kCheckpoint, sizeof kCheckpoint) != 0) {
    throw Fault(file + ": is no checkpoint of lordba_trainer; remove it or name another");
  }
  if (header.layout != layout_hash_ || header.size != latents.size()) {
    throw Fault(file + ": belongs to another training program; remove it or name another");
  }
  if (header.optimizer != static_cast<uint64_t>(optimizer_.kind) || header.state_bytes != state_.size()) {
    throw Fault(file + ": was made with another optimizer; repeat with that one, or remove the file");
  }
  std::error_code unknown;
  const uint64_t body = latents.size() * sizeof(float) + state_.size();
  if (fs::file_size(file, unknown) != sizeof header + body + header.note_bytes) {
    throw Fault(file + ": is truncated; remove it");
  }
  std::vector<float> loaded(latents.size());
  std::vector<uint8_t> state(state_.size());
  std::string note(header.note_bytes, '\0');
  in.read(reinterpret_cast<char*>(loaded.data()), loaded.size() * sizeof(float));
  in.read(reinterpret_cast<char*>(state.data()), state.size());
  in.read(note.data(), note.size());
  Digest digest;
  digest.take(loaded.data(), loaded.size() * sizeof(float));
  digest.take(state.data(), state.size());
  digest.take(note.data(), note.size());
  if (!in || digest.value() != header.digest) throw Fault(file + ": is damaged; remove it");
  std::copy(loaded.begin(), loaded.end(), latents.begin());  // in place: callers hold pointers to it
  state_.swap(state);
  steps = header.steps;
  added_.clear();
  sums_.clear();
  return note;
}

void Trainer::write_adapter(lordba_scale_code code, const char* template_file, const std::string& file) const {
  Bytes records, data;
  const size_t start = 32 + 64 * modules.size();
  for (uint32_t i = 0; i < modules.size(); ++i) {
    const lordba_trainer_module& m = modules[i];
    const bool is_adapted = m.r > 0;
    for (const uint32_t value : {m.r, m.d_in, m.d_out, static_cast<uint32_t>(code)}) {
      records.put(is_adapted ? value : 0u);
    }
    if (!is_adapted) {
      for (int k = 0; k < 6; ++k) records.put(uint64_t{0});
      continue;
    }
    std::vector<uint8_t> a(size_t{m.r} * ((m.d_in + 7) / 8)), b(size_t{m.d_out} * ((m.r + 7) / 8));
    const uint32_t lengths[3] = {m.d_in, m.r, m.d_out};
    std::vector<uint8_t> scales[3];
    lordba_packed packed{a.data(), b.data(), {}, {}};
    for (int s = 0; s < 3; ++s) {
      scales[s].resize(lordba_stored_bytes(code, lengths[s]));
      packed.scales[s] = scales[s].data();
    }
    pack(i, code, &packed);
    const auto place = [&] {
      data.align(start);
      records.put(static_cast<uint64_t>(start + data.size()));
    };
    place();
    data.add(a.data(), a.size());
    place();
    data.add(b.data(), b.size());
    for (int s = 0; s < 3; ++s) {
      place();
      put_meaning(data, code, packed.ranges[s]);
      data.add(scales[s].data(), scales[s].size());
    }
    records.put(uint64_t{0});
  }
  const uint64_t total = start + data.size();
  std::vector<uint8_t> before;
  uint64_t size = total;
  if (template_file) {
    before = read_file(template_file);
    const auto at = std::search(before.begin(), before.end(), std::begin(kBlob), std::end(kBlob));
    if (at == before.end()) throw Fault(std::string(template_file) + ": is no adapter file of a bundle");
    size = static_cast<uint64_t>(before.end() - at);
    before.erase(at, before.end());
    if (total > size) {
      throw Fault("an adapter of " + std::to_string(total) + " bytes does not fit a program made for at most " +
                  std::to_string(size) + "; pack with smaller scales");
    }
  }
  Bytes header;
  header.add(kBlob, sizeof kBlob);
  header.put(uint32_t{1});
  header.put(static_cast<uint32_t>(modules.size()));
  header.put(total);
  header.put(uint64_t{0});
  const std::vector<uint8_t> padding(size - total);
  NewFile out(file);
  out.write(before.data(), before.size());
  out.write(header.data(), header.size());
  out.write(records.data(), records.size());
  out.write(data.data(), data.size());
  out.write(padding.data(), padding.size());
  out.finish();
}

}  // namespace lordba
