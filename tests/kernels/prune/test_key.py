"""csrc/prune/key.h on the host: integer order is score order, digits cover every bit."""

import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[3] / "csrc"

PROGRAM = r"""
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include "prune/key.h"
using namespace drive;

static_assert(key_of_bits<int32_t>(0) == 1, "zero");
static_assert(key_of_bits<int32_t>(0x80000000u) == 1, "negative zero");
static_assert(kDead<int32_t> < key_of_bits<int32_t>(0), "pruned entries rank below a score of zero");
static_assert(bits_of_key<int32_t>(key_of_bits<int32_t>(0x12345678u)) == 0x12345678u, "");
static_assert(bits_of_key<int64_t>(kDead<int64_t>) == 0, "");
static_assert(kDigits<int32_t> == 3 && kDigits<int64_t> == 6, "");
static_assert(digit_shift<int32_t>(0) == 21 && digit_shift<int32_t>(1) == 10, "");
static_assert(digit_shift<int32_t>(2) == 0, "");
static_assert(digit_shift<int64_t>(4) == 9 && digit_shift<int64_t>(5) == 0, "");
static_assert(has_prefix<int32_t>(7, 9, 0) && !has_prefix<int32_t>(7, 9, 3), "");

template <class Key>
int check() {
  using Score = typename KeyTraits<Key>::Score;
  using Bits = typename KeyTraits<Key>::Bits;
  using Limits = std::numeric_limits<Score>;
  const auto key = [](Score s) { Bits b; std::memcpy(&b, &s, sizeof b); return key_of_bits<Key>(b); };
  const Score ascending[] = {
      0, Limits::denorm_min(), Limits::min() / 2, Limits::min(), Score(1e-20), Score(0.5),
      std::nextafter(Score(0.5), Score(1)), 1, Limits::max()};
  int errors = 0;
  for (int i = 0; i + 1 < 9; ++i) errors += !(key(ascending[i]) < key(ascending[i + 1]));
  for (Score s : ascending) {
    errors += key(s) != key(-s) || !is_finite(key(s));
    Bits rebuilt = 0;
    for (int d = 0; d < kDigits<Key>; ++d) {
      errors += !has_prefix<Key>(key(s), static_cast<Key>(rebuilt), d);
      rebuilt |= static_cast<Bits>(bucket(key(s), d)) << digit_shift<Key>(d);
    }
    errors += static_cast<Key>(rebuilt) != key(s);
  }
  errors += is_finite(key(Limits::infinity())) || is_finite(key(Limits::quiet_NaN()));
  errors += is_finite(key_of_bits<Key>(~Bits{0}));
  errors += !(key(Limits::max()) < kTop<Key>);
  return errors;
}

int main() {
  const int errors = check<int32_t>() + check<int64_t>();
  std::printf("%d errors\n", errors);
  return errors;
}
"""


@pytest.mark.parametrize("standard", ("c++17", "c++20"))
def test_key(standard: str, tmp_path: Path):
    source, program = tmp_path / "key.cpp", tmp_path / "key"
    source.write_text(PROGRAM)
    flags = [f"-std={standard}", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
    subprocess.run(["g++", *flags, str(source), "-o", str(program)], check=True)
    run = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "0 errors\n")
