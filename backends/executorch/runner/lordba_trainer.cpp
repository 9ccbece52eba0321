// Trains an adapter with a bundle's training program, without Python: a loop over lordba_trainer.h, as an app has one.
#include "lordba_trainer.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr const char* kUsage = R"(usage: lordba_trainer TRAIN.pte --tokens FILE --adapter OUT [options]

Trains on lines of token ids, one sequence a line, one sequence a step, in their order and from the start again. Prints
the loss of every step, then writes the adapter as the bundle's program reads it.

  --template FILE    the bundle's adapters/none.ptd, where its adapters are data files (default: write a blob)
  --checkpoint FILE  saved after every N steps; training goes on from it if it is there
  --save-every N     (default: 10)
  --steps N          (default: 100)
  --rate R           learning rate (default: 1e-3)
  --optimizer NAME   adamw (default), adamw8bit or sgd
  --scales CODE      log4 (default), int8, fp16 or fp32
  --seed N           of the latents (default: 0)

example: lordba_trainer bundle/train.pte --tokens notes.ids --template bundle/adapters/none.ptd --adapter notes.ptd
)";

// The user's mistake: exit code 2. Any other exception is a fault: exit code 1.
struct Mistake : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Options {
  std::string program, tokens, adapter, adapter_template, checkpoint;
  uint64_t steps = 100, save_every = 10, seed = 0;
  float rate = 1e-3f;
  lordba_optimizer optimizer{LORDBA_ADAMW, 0.9f, 0.999f, 1e-8f, 0.0f};
  lordba_scale_code scales = LORDBA_LOG4;
};

double number(const std::string& text, const std::string& name, double least) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !(value >= least) || value > 1e12) {
    throw Mistake(name + ": expected a number from " + std::to_string(least) + " on, found '" + text + "'");
  }
  return value;
}

template <typename T>
T choice(const std::string& text, const std::string& name, const std::vector<std::pair<const char*, T>>& choices) {
  for (const auto& [word, value] : choices) {
    if (text == word) return value;
  }
  throw Mistake(name + ": '" + text + "' is none of its values; see --help");
}

Options parse(const std::vector<std::string>& words) {
  Options options;
  for (size_t i = 0; i < words.size(); ++i) {
    const std::string& name = words[i];
    if (name.rfind("--", 0) != 0) {
      if (!options.program.empty()) throw Mistake("one program at a time: " + options.program + " or " + name);
      options.program = name;
      continue;
    }
    if (i + 1 == words.size()) throw Mistake(name + ": expected a value or is unknown; see --help");
    const std::string& value = words[++i];
    if (name == "--tokens") {
      options.tokens = value;
    } else if (name == "--adapter") {
      options.adapter = value;
    } else if (name == "--template") {
      options.adapter_template = value;
    } else if (name == "--checkpoint") {
      options.checkpoint = value;
    } else if (name == "--save-every") {
      options.save_every = static_cast<uint64_t>(number(value, name, 1));
    } else if (name == "--steps") {
      options.steps = static_cast<uint64_t>(number(value, name, 1));
    } else if (name == "--seed") {
      options.seed = static_cast<uint64_t>(number(value, name, 0));
    } else if (name == "--rate") {
      options.rate = static_cast<float>(number(value, name, 0));
    } else if (name == "--optimizer") {
      options.optimizer.kind = choice<lordba_optimizer_kind>(
          value, name, {{"adamw", LORDBA_ADAMW}, {"adamw8bit", LORDBA_ADAMW8}, {"sgd", LORDBA_SGD}});
    } else if (name == "--scales") {
      options.scales = choice<lordba_scale_code>(
          value, name, {{"log4", LORDBA_LOG4}, {"int8", LORDBA_INT8}, {"fp16", LORDBA_FP16}, {"fp32", LORDBA_FP32}});
    } else {
      throw Mistake(name + ": unknown option; see --help");
    }
  }
  if (options.program.empty()) throw Mistake("no program given; see --help");
  if (options.tokens.empty() || options.adapter.empty()) throw Mistake("--tokens or --adapter is missing; see --help");
  return options;
}

std::vector<std::vector<int64_t>> sequences_of(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw Mistake(path + ": cannot be read; name an existing file");
  std::vector<std::vector<int64_t>> found;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::vector<int64_t> ids;
    for (int64_t id; words >> id;) ids.push_back(id);
    if (!words.eof()) throw Mistake(path + ": holds something else than token ids: '" + line.substr(0, 40) + "'");
    if (ids.size() > 1) found.push_back(ids);
  }
  if (found.empty()) throw Mistake(path + ": holds no sequence of two tokens or more");
  return found;
}

class Trainer {
 public:
  explicit Trainer(const Options& options) {
    char error[1000] = "";
    trainer_ = lordba_trainer_open(options.program.c_str(), &options.optimizer, options.seed, error, sizeof error);
    if (!trainer_) throw Mistake(error);
  }
  Trainer(const Trainer&) = delete;
  Trainer& operator=(const Trainer&) = delete;
  ~Trainer() { lordba_trainer_close(trainer_); }

  lordba_trainer* get() const { return trainer_; }
  void check(int status) const {
    if (status != 0) throw Mistake(lordba_trainer_error(trainer_));
  }

 private:
  lordba_trainer* trainer_;
};

void run(const Options& options) {
  const auto sequences = sequences_of(options.tokens);
  const Trainer trainer(options);
  if (!options.checkpoint.empty() && std::ifstream(options.checkpoint)) {
    char note[1];
    size_t note_bytes = 0;
    trainer.check(lordba_trainer_load(trainer.get(), options.checkpoint.c_str(), note, 0, &note_bytes));
  }
  for (uint64_t step = lordba_trainer_steps(trainer.get()); step < options.steps; ++step) {
    const std::vector<int64_t>& ids = sequences[step % sequences.size()];
    double loss = 0.0;
    trainer.check(lordba_trainer_add(trainer.get(), ids.data(), ids.data() + 1, ids.size() - 1,
                                     1.0f / static_cast<float>(ids.size() - 1), &loss));
    if (!std::isfinite(loss)) throw Mistake("the loss is not finite: training diverged; lower --rate");
    trainer.check(lordba_trainer_update(trainer.get(), options.rate, 1.0f));
    std::printf("%llu %.6f\n", static_cast<unsigned long long>(step + 1), loss);
    std::fflush(stdout);
    if (!options.checkpoint.empty() && ((step + 1) % options.save_every == 0 || step + 1 == options.steps)) {
      trainer.check(lordba_trainer_save(trainer.get(), options.checkpoint.c_str(), "", 0));
    }
  }
  const char* form = options.adapter_template.empty() ? nullptr : options.adapter_template.c_str();
  trainer.check(lordba_trainer_write_adapter(trainer.get(), options.scales, form, options.adapter.c_str()));
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
