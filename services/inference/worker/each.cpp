// What adapters add at a site, to each token what its own makes: out[t] += B (A x[t]).
//
// Law of this room: knows numbers in memory and nothing of torch or Python. Numbers are bfloat16, sums fp32. Each
// adapter's matrices are read once, in the order in which they lie; a token's sums are added up in the same order
// whoever else is there. Whoever calls it keeps what the addresses mean (see each.py) and lets nobody else write there.

#include <atomic>
#include <cstdint>
#include <cstring>

// One form for each width of a processor's registers; prebuild says which.
#if defined(__AVX512F__)
constexpr int64_t LANES = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8, REGISTERS = 16;
#else
constexpr int64_t LANES = 4, REGISTERS = 16;
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef const uint16_t* In;
typedef uint16_t* Out;

constexpr int64_t TOKENS = 4;               // that share a reading of A and B
constexpr int64_t ROWS = REGISTERS / 8;     // of A that are read side by side
constexpr int64_t COLUMNS = REGISTERS / 8;  // vectors of a row of B that are; with so many, sums stay in registers
constexpr int64_t AHEAD = 128;              // numbers of a row of B that are called for before they are needed
constexpr int64_t RANK = 256;               // the largest; as in each.py

// of one adapter at one module: a [rank, in], b [rank, out]; rank 0 = it leaves the module alone
struct Part { In a; In b; int64_t rank; };
// widths [modules], parts [modules, places], starts [modules]: where each module's outputs begin, if they stand together
struct Site { int64_t modules, places, width; const int64_t* widths; const Part* parts; const int64_t* starts; };
// groups [count] are tokens[begin ... end] of the adapter at a place; below zero = of none
struct Group { int64_t place, begin, end; };
struct Turn { int64_t count; const Group* groups; const int64_t* tokens; };
struct Rows { Out at; int64_t stride; };

INLINE float wide(uint16_t half) {
  uint32_t word = uint32_t(half) << 16;
  float number;
  memcpy(&number, &word, sizeof number);
  return number;
}

INLINE void wide(In at, Floats& numbers) {
  Halves halves;
  memcpy(&halves, at, sizeof halves);
  Words words = __builtin_convertvector(halves, Words) << 16;
  memcpy(&numbers, &words, sizeof numbers);
}

// To the nearest, ties to even; what is no number stays none.
INLINE void narrow(const Floats& numbers, Out at) {
  Words words;
  memcpy(&words, &numbers, sizeof words);
  Words none = (Words)((words & 0x7fffffffu) > 0x7f800000u);
  words = ((words + 0x7fffu + ((words >> 16) & 1)) & ~none) | ((words | 0x400000u) & none);
  Halves halves = __builtin_convertvector(words >> 16, Halves);
  memcpy(at, &halves, sizeof halves);
}

INLINE uint16_t narrow(float number) {
  uint16_t halves[LANES];
  narrow(Floats{} + number, halves);
  return halves[0];
}

// inner[t][row ... row + R] = rows of A times x[t]
template <int R, int T>
INLINE void dots(In a, int64_t width, const In* x, float (*inner)[RANK], int64_t row) {
  Floats sums[R][T] = {};
  int64_t k = 0;
  for (; k + LANES <= width; k += LANES) {
    Floats own[T], shared;
    for (int t = 0; t < T; t++) wide(x[t] + k, own[t]);
    for (int r = 0; r < R; r++) {
      __builtin_prefetch(a + (R + r) * width + k);  // of the next rows
      wide(a + r * width + k, shared);
      for (int t = 0; t < T; t++) sums[r][t] += shared * own[t];
    }
  }
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) {
      float sum = 0;
      for (int64_t lane = 0; lane < LANES; lane++) sum += sums[r][t][lane];
      for (int64_t rest = k; rest < width; rest++) sum += wide(a[r * width + rest]) * wide(x[t][rest]);
      inner[t][row + r] = sum;
    }
}

// y[t][n ... n + W * LANES] += columns of B times inner[t]
template <int W, int T>
INLINE void columns(In b, int64_t rank, int64_t width, const Out* y, float (*inner)[RANK], int64_t n) {
  Floats sums[T][W], shared;
  for (int t = 0; t < T; t++)
    for (int w = 0; w < W; w++) wide(y[t] + n + w * LANES, sums[t][w]);
  for (int64_t r = 0; r < rank; r++) {
    In at = b + r * width + n;
    for (int w = 0; w < W; w += 2) __builtin_prefetch(at + AHEAD + w * LANES);
    for (int w = 0; w < W; w++) {
      wide(at + w * LANES, shared);
      for (int t = 0; t < T; t++) sums[t][w] += shared * inner[t][r];
    }
  }
  for (int t = 0; t < T; t++)
    for (int w = 0; w < W; w++) narrow(sums[t][w], y[t] + n + w * LANES);
}

template <int T>
INLINE void some(const Part& part, int64_t in, int64_t out, const In* x, const Out* y) {
  float inner[T][RANK];
  int64_t r = 0, n = 0;
  for (; r + ROWS <= part.rank; r += ROWS) dots<ROWS, T>(part.a + r * in, in, x, inner, r);
  for (; r < part.rank; r++) dots<1, T>(part.a + r * in, in, x, inner, r);
  for (; n + COLUMNS * LANES <= out; n += COLUMNS * LANES) columns<COLUMNS, T>(part.b, part.rank, out, y, inner, n);
  for (; n + LANES <= out; n += LANES) columns<1, T>(part.b, part.rank, out, y, inner, n);
  for (; n < out; n++)
    for (int t = 0; t < T; t++) {
      float sum = wide(y[t][n]);
      for (int64_t q = 0; q < part.rank; q++) sum += wide(part.b[q * out + n]) * inner[t][q];
      y[t][n] = narrow(sum);
    }
}

// e to the power of what lies between -87 and 87, to the last digits of fp32.
INLINE Floats power(const Floats& of) {
  const Floats least = Floats{} - 87.f, most = Floats{} + 87.f;
  Floats z = of < least ? least : of;
  z = z > most ? most : z;
  const Floats whole = (z * 1.44269504f + 12582912.f) - 12582912.f;  // rounded
  const Floats rest = z - whole * 0.693359375f + whole * 2.12194440e-4f;
  Floats sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 0.5f;
  sum = sum * rest * rest + rest + 1.f;
  Words twos = __builtin_convertvector(whole + 127.f, Words) << 23;
  Floats scale;
  memcpy(&scale, &twos, sizeof scale);
  return sum * scale;
}

// opening = silu(opening) * passing
static void gate(Out opening, In passing, int64_t count) {
  Floats x, y;
  int64_t n = 0;
  for (; n + LANES <= count; n += LANES) {
    wide(opening + n, x);
    wide(passing + n, y);
    narrow(x / (power(-x) + 1.f) * y, opening + n);
  }
  for (; n < count; n++) {
    x = Floats{} + wide(opening[n]);
    opening[n] = narrow((x / (power(-x) + 1.f))[0] * wide(passing[n]));
  }
}

static void change(const Part& part, int64_t in, int64_t out, const In* x, const Out* y, int64_t tokens) {
  switch (tokens) {
    case 1: some<1>(part, in, out, x, y); break;
    case 2: some<2>(part, in, out, x, y); break;
    case 3: some<3>(part, in, out, x, y); break;
    default: some<4>(part, in, out, x, y);
  }
}

// x [tokens, in] and out [tokens, all outputs] by rows that lie so far apart. Threads take groups and modules as they come:
// each of these is A, then B, for tokens that nobody else writes to, so that no thread waits for another in between.
// With `passing` the second of two modules has its outputs there, the first has them at `out`, which then becomes
// silu(out) * passing; of all tokens, also those without adapters.
extern "C" void qlorad_each(
    const Site* site, const Turn* turn, In x, int64_t stride, Out out, int64_t apart, Out passing, int64_t passing_apart,
    int threads) {
  const bool gated = passing != nullptr;
  std::atomic<int64_t> next{0};
  const int64_t modules = gated ? 1 : site->modules, all = modules * turn->count;
  auto add = [&](int64_t module, const Group& group) {
    const Part& part = site->parts[module * site->places + group.place];
    if (part.rank == 0) return;
    const Rows rows = !gated ? Rows{out + site->starts[module], apart} : module ? Rows{passing, passing_apart} : Rows{out, apart};
    for (int64_t t = group.begin; t < group.end; t += TOKENS) {
      const int64_t count = group.end - t < TOKENS ? group.end - t : TOKENS;
      In xs[TOKENS];
      Out ys[TOKENS];
      for (int64_t i = 0; i < count; i++) {
        xs[i] = x + turn->tokens[t + i] * stride;
        ys[i] = rows.at + turn->tokens[t + i] * rows.stride;
      }
      change(part, site->width, site->widths[module], xs, ys, count);
    }
  };
  auto work = [&] {
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < all;) {
      const Group& group = turn->groups[item / modules];
      if (group.place >= 0)
        for (int64_t m = 0; m < (gated ? site->modules : 1); m++) add(gated ? m : item % modules, group);
      for (int64_t t = group.begin; gated && t < group.end; t++) {
        const int64_t token = turn->tokens[t];
        gate(out + token * apart, passing + token * passing_apart, site->widths[0]);
      }
    }
  };
#pragma omp parallel num_threads(threads) if (threads > 1 && all > 1)
  work();
}
