// Runs an exported program without Python: feeds tokens, writes the logits of every step, continues greedily.
#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "program.h"

// The executorch package has this in its library, but no header of it.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace {

namespace fs = std::filesystem;
using lordba::Blob;
using lordba::Mistake;
using lordba::Program;
using lordba::read_file;

constexpr const char* kUsage = R"(usage: lordba_runner MODEL.pte --tokens IDS [options]

Feeds tokens to a program made by python -m lordba.export and prints the tokens that follow, separated by spaces.

  --tokens IDS       token ids, separated by commas or spaces; @FILE reads them from a file
  --adapter FILE     the adapter's file in the bundle: .ptd, or .blob where the program takes it as an input
  --prefill N        feed the first N tokens at once and the others one by one (default: all at once)
  --generate N       continue greedily with up to N tokens
  --logits FILE      write the logits of every step: float32 [steps, vocabulary], in this machine's byte order
  --repeat N         feed the tokens N times, each time from an empty cache (default: once)
  --threads N        run on that many threads (default: as many as ExecuTorch chooses)
  --times FILE       write how long each step took, a line each: load, prefill or decode, its tokens, milliseconds

example: lordba_runner bundle/model.pte --adapter bundle/adapters/shakespeare.ptd --tokens 504,2365 --generate 8
)";

struct Options {
  std::string program, adapter, logits, times;
  std::vector<int64_t> tokens;
  size_t prefill = std::numeric_limits<size_t>::max();
  size_t generate = 0;
  size_t repeat = 1;
  size_t threads = 0;
};

int64_t natural(std::string_view text, const std::string& what) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0) {
    throw Mistake(what + ": expected an integer from 0 on, found '" + std::string(text) + "'");
  }
  return value;
}

std::vector<int64_t> token_ids(const std::string& argument) {
  std::string text = argument;
  if (text.rfind('@', 0) == 0) {
    const Blob bytes = read_file(text.substr(1));
    text.assign(bytes.begin(), bytes.end());
  }
  constexpr const char* separators = ", \t\r\n";
  std::vector<int64_t> ids;
  for (size_t begin = 0; (begin = text.find_first_not_of(separators, begin)) != std::string::npos;) {
    const size_t end = std::min(text.find_first_of(separators, begin), text.size());
    ids.push_back(natural(std::string_view(text).substr(begin, end - begin), "--tokens"));
    begin = end;
  }
  if (ids.empty()) throw Mistake("--tokens: " + argument + " holds no token; give at least one");
  return ids;
}

Options parse(const std::vector<std::string>& arguments) {
  Options options;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& name = arguments[i];
    if (name.rfind("--", 0) != 0) {
      if (!options.program.empty()) throw Mistake("one program at a time: " + options.program + " or " + name);
      options.program = name;
      continue;
    }
    if (i + 1 == arguments.size()) throw Mistake(name + ": expected a value or is unknown; see --help");
    const std::string& value = arguments[++i];
    if (name == "--tokens") {
      options.tokens = token_ids(value);
    } else if (name == "--adapter") {
      options.adapter = value;
    } else if (name == "--logits") {
      options.logits = value;
    } else if (name == "--threads") {
      options.threads = static_cast<size_t>(natural(value, name));
      if (options.threads == 0) throw Mistake("--threads: at least one thread runs");
    } else if (name == "--times") {
      options.times = value;
    } else if (name == "--repeat") {
      options.repeat = static_cast<size_t>(natural(value, name));
      if (options.repeat == 0) throw Mistake("--repeat: the tokens are fed at least once");
    } else if (name == "--generate") {
      options.generate = static_cast<size_t>(natural(value, name));
    } else if (name == "--prefill") {
      options.prefill = static_cast<size_t>(natural(value, name));
      if (options.prefill == 0) throw Mistake("--prefill: at least one token is fed first");
    } else {
      throw Mistake(name + ": unknown option; see --help");
    }
  }
  if (options.program.empty()) throw Mistake("no program given; see --help");
  if (options.tokens.empty()) throw Mistake("--tokens is missing; see --help");
  return options;
}

// A file under a temporary name, which `finish` renames; without it nothing is left behind.
class NewFile {
 public:
  explicit NewFile(const std::string& path) : path_(path), temporary_(path + ".partial") {
    if (path.empty()) return;
    file_.open(temporary_, std::ios::binary);
    if (!file_) throw Mistake(path + ": cannot be written; name a file in a folder that exists and is yours");
  }
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;
  ~NewFile() {
    std::error_code ignored;
    if (file_.is_open()) fs::remove(temporary_, ignored);
  }

  void write(const std::vector<float>& values) {
    if (file_.is_open()) file_.write(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
  }

  void write_line(const std::string& line) {
    if (file_.is_open()) file_ << line << '\n';
  }

  void finish() {
    if (!file_.is_open()) return;
    file_.flush();
    std::error_code error;
    if (file_) fs::rename(temporary_, path_, error);
    if (!file_ || error) throw Mistake(path_ + ": cannot be written; is the disk full?");
    file_.close();
  }

 private:
  std::string path_, temporary_;
  std::ofstream file_;
};

// A text that grows: feeds tokens to the program in runs of its longest input, like lordba.runtime.session.Session in
// Python.
class Text {
 public:
  explicit Text(Program& program) : program_(program) {}

  // Forgets the text; the cache is overwritten from the start.
  void reset() { length_ = 0; }

  // Appends tokens; the logits of what comes next, [vocabulary].
  std::vector<float> feed(const int64_t* tokens, size_t count) {
    if (!has_room(count)) {
      throw Mistake(std::to_string(count) + " tokens after " + std::to_string(length_) +
                    " do not fit the program, which was exported for " + std::to_string(program_.longest_text()) +
                    "; give fewer or export with a larger --max-seq-len");
    }
    std::vector<float> logits;
    for (size_t begin = 0; begin < count;) {
      const size_t part = std::min(count - begin, static_cast<size_t>(program_.longest_input()));
      logits = program_.run(tokens + begin, part, length_);
      length_ += static_cast<int64_t>(part);
      begin += part;
    }
    return logits;
  }

  bool has_room(size_t count) const { return count <= static_cast<size_t>(program_.longest_text() - length_); }

 private:
  Program& program_;
  int64_t length_ = 0;
};

void use_adapter(Program& program, const std::string& adapter) {
  if (program.takes_blob()) {
    if (adapter.empty()) throw Mistake("the program takes its adapter as an input; give one by --adapter");
    program.use(std::make_shared<const Blob>(read_file(adapter)));
  } else {
    program.use(adapter.empty() ? std::vector<std::string>{} : std::vector<std::string>{adapter});
  }
}

// Calls a step and notes how long it took, if anybody wants to know.
class Clock {
 public:
  explicit Clock(const std::string& path) : file_(path) {}

  template <typename Step>
  void time(const char* phase, size_t tokens, const Step& step) {
    const auto started = std::chrono::steady_clock::now();
    step();
    const std::chrono::duration<double, std::milli> spent = std::chrono::steady_clock::now() - started;
    file_.write_line(phase + (" " + std::to_string(tokens)) + " " + std::to_string(spent.count()));
  }

  void finish() { file_.finish(); }

 private:
  NewFile file_;
};

void run(const Options& options) {
  if (options.threads != 0) {
    executorch::extension::threadpool::get_threadpool()->_unsafe_reset_threadpool(
        static_cast<uint32_t>(options.threads));
  }
  Clock clock(options.times);
  std::optional<Program> program;
  clock.time("load", 0, [&] {
    program.emplace(options.program);
    use_adapter(*program, options.adapter);
  });
  Text text(*program);
  NewFile file(options.logits);
  std::vector<float> logits;
  const auto step = [&](const char* phase, const int64_t* tokens, size_t count) {
    clock.time(phase, count, [&] { logits = text.feed(tokens, count); });
    file.write(logits);
  };
  const size_t first = std::min(options.prefill, options.tokens.size());
  for (size_t round = 0; round < options.repeat; ++round) {
    text.reset();
    step("prefill", options.tokens.data(), first);
    for (size_t i = first; i < options.tokens.size(); ++i) step("decode", &options.tokens[i], 1);
  }
  for (size_t i = 0; i < options.generate; ++i) {
    const int64_t token = std::max_element(logits.begin(), logits.end()) - logits.begin();
    if (program->is_end(token)) break;
    std::printf(i == 0 ? "%lld" : " %lld", static_cast<long long>(token));
    std::fflush(stdout);
    if (i + 1 == options.generate || !text.has_room(1)) break;
    step("decode", &token, 1);
  }
  if (options.generate != 0) std::printf("\n");
  file.finish();
  clock.finish();
}

}  // namespace

int main(int count, char** arguments) {
  try {
    const std::vector<std::string> words(arguments + 1, arguments + count);
    if (words.empty() || words[0] == "--help") {
      std::fputs(kUsage, words.empty() ? stderr : stdout);
      return words.empty() ? 2 : 0;
    }
    run(parse(words));
    return 0;
  } catch (const Mistake& mistake) {
    std::fprintf(stderr, "error: %s\n", mistake.what());
    return 2;
  } catch (const std::exception& fault) {
    std::fprintf(stderr, "error: %s\n", fault.what());
    return 1;
  }
}
