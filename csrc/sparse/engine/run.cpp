// drive::engine_run: a program, with all of a team's threads.
//
// Phases whose units are as many as the threads form a chain: a thread takes a unit of the last one, and makes
// those that it consists of right before, so that what they wrote is still in its cache. Units beyond a multiple
// of the threads, and those of later phases, are made by all threads together, step by step.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <vector>

#define AT_PER_OPERATOR_HEADERS
#include <ATen/ops/from_blob.h>

#include "common/common.h"
#include "sparse/engine/steps.h"
#include "sparse/engine/team.h"

namespace drive::engine {
namespace {

class Run {
 public:
  Run(const int64_t* program, const Phase* phases, int64_t chained, int64_t count, int threads, const Memory& memory,
      int64_t sums)
      : program_(program), phases_(phases), threads_(threads), memory_(memory), sums_(sums) {
    if (chained > 0) {
      const int64_t top = chained - 1, whole = phases[top].units / threads * threads;
      if (whole > 0) rounds_.push_back({nullptr, {0, 0}, whole, top});
      for (int64_t u = whole; u < phases[top].units; ++u) together(top, u);
    }
    for (int64_t k = chained; k < count; ++k) {
      for (int64_t u = 0; u < phases[k].units; ++u) steps_together(k, u);
    }
  }

  void all() {
    Team team(threads_, static_cast<int64_t>(rounds_.size()));
    team.run([&](int thread) {
      Memory mine = memory_;
      mine.sums += sums_ * thread;
      for (size_t r = 0; r < rounds_.size(); ++r) {
        const Round& round = rounds_[r];
        team.round(static_cast<int64_t>(r), thread, round.items, [&](int64_t i) {
          if (round.step) {
            run_item(round.step, mine, round.unit, i);
          } else {
            alone(round.phase, {i, thread}, mine);
          }
        });
      }
    });
  }

 private:
  struct Round {
    const Header* step;  // null: `items` units of the chain, each by one thread
    Unit unit;
    int64_t items, phase;
  };

  template <class Do>
  void each_step(int64_t phase, const Do& act) const {
    for (int64_t at = phases_[phase].begin; at < phases_[phase].end;) {
      const Header* const step = reinterpret_cast<const Header*>(program_ + at);
      act(step);
      at += step->size;
    }
  }

  void steps_together(int64_t phase, int64_t unit) {
    each_step(phase, [&](const Header* step) { rounds_.push_back({step, {unit, 0}, step->items, phase}); });
  }

  // The units of the phase before that this one is made of, as far as there are so many.
  template <class Make>
  void before(int64_t phase, int64_t unit, const Make& make) const {
    if (phase == 0) return;
    const int64_t ratio = phases_[phase].ratio;
    for (int64_t i = unit * ratio; i < std::min((unit + 1) * ratio, phases_[phase - 1].units); ++i) make(i);
  }

  void together(int64_t phase, int64_t unit) {
    before(phase, unit, [&](int64_t i) { together(phase - 1, i); });
    steps_together(phase, unit);
  }

  void alone(int64_t phase, const Unit& unit, const Memory& memory) const {
    before(phase, unit.index, [&](int64_t i) { alone(phase - 1, {i, unit.thread}, memory); });
    each_step(phase, [&](const Header* step) {
      for (int64_t i = 0; i < step->items; ++i) run_item(step, memory, unit, i);
    });
  }

  const int64_t* program_;
  const Phase* phases_;
  int threads_;
  Memory memory_;
  int64_t sums_;
  std::vector<Round> rounds_;
};

// plain: inputs and outputs. phases: [n][4]; the first `chained` are a chain. sums: where in the arena the room for
// sums begins, and its size a thread, in floats.
void engine_run(at::TensorList plain, const at::Tensor& program, const at::Tensor& phases, int64_t chained,
                at::TensorList constants, const at::Tensor& arena, at::IntArrayRef sums, int64_t batch,
                int64_t threads) {
  std::vector<float*> tensors;
  for (const at::Tensor& t : plain) {
    TORCH_CHECK_VALUE(t.is_contiguous() && t.scalar_type() == at::kFloat,
                      "engine_run: tensors must be contiguous float32, got ", t.scalar_type());
    tensors.push_back(static_cast<float*>(t.data_ptr()));
  }
  std::vector<const void*> data;
  for (const at::Tensor& t : constants) data.push_back(t.const_data_ptr());
  float* const memory = static_cast<float*>(arena.data_ptr());
  Run(program.const_data_ptr<int64_t>(), reinterpret_cast<const Phase*>(phases.const_data_ptr<int64_t>()), chained,
      phases.size(0), static_cast<int>(threads), {memory, tensors.data(), data.data(), batch, memory + sums[0]},
      sums[1])
      .all();
}

// [bytes] uint8 in huge pages: the L2 cache goes by physical addresses, and small pages leave some of its sets
// with too much to hold.
at::Tensor engine_arena(int64_t bytes) {
  const size_t size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  void* const memory = std::aligned_alloc(kHugePage, size);
  if (!memory) throw std::bad_alloc();
  expect_writes(memory, size);
  return at::from_blob(memory, {bytes}, [](void* p) { std::free(p); }, at::TensorOptions().dtype(at::kByte));
}

}  // namespace

TORCH_LIBRARY_IMPL(drive, CPU, m) { m.impl("engine_run", &engine_run); }
TORCH_LIBRARY_IMPL(drive, CompositeExplicitAutograd, m) { m.impl("engine_arena", &engine_arena); }

}  // namespace drive::engine
