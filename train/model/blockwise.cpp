// Causal attention within documents, forward and backward, for a CPU: blocks of N keys against N queries, in float32.
//
//     P = softmax(scale · Q·Kᵀ),  O = P·V        over the keys from the query's document's first token to the query
//
// Blocks that no query sees are skipped. A block's scores stay in the cache; of the softmax its log-sum-exp is kept
// (base 2), and the backward pass recomputes the rest (as FlashAttention, arXiv 2205.14135). Scores are transposed, keys
// by queries, so that maxima, sums and factors of 16 queries are elements of one vector. One thread computes all of a
// head, or of the heads that share keys, so the result does not depend on the number of threads.
//
// Tensors are contiguous: q, out and their gradients (B, L, H, D), k, v and theirs (B, L, G, D), float32 or bf16;
// positions (B, L); lse (B, H, padded), where padded is L up to the next multiple of N. Queries from L on are zeros.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

namespace at::native::cpublas {  // PyTorch's, by oneDNN: C (m, n) = A (m, k) · B (k, n), added to C if `add`
void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const float* a,
            const float* b, float* c, bool is_vnni);
}

namespace {

constexpr int64_t N = 64;
constexpr float LOG2_E = 1.44269504f;

struct Sizes {
  int64_t B, L, H, G, D;
};

struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
To cast(From from) {
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

float read(float x) { return x; }
float read(BFloat16 x) { return cast<float>(uint32_t(x.bits) << 16); }

void write(float x, float& to) { to = x; }
void write(float x, BFloat16& to) {  // to the nearest, ties to even
  const uint32_t bits = cast<uint32_t>(x);
  to.bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// 2^x for x ≤ 0, within 2 ulp: the integer nearest to x goes to the exponent, a polynomial takes the rest. 0 below -126.
float power_of_2(float x) {
  const float shifted = x + 12582912.0f, f = x - (shifted - 12582912.0f);  // 1.5 · 2^23 leaves no bits of a fraction
  const float p =
      1 + f * (0.69314718f +
               f * (0.24022651f + f * (0.055503324f + f * (0.0096183535f + f * (0.0013398874f + f * 0.0001540353f)))));
  return x < -126 ? 0 : cast<float>(cast<uint32_t>(p) + (cast<uint32_t>(shifted) << 23));
}

void product(int64_t m, int64_t n, int64_t k, bool add, const float* a, const float* b, float* c) {
  at::native::cpublas::brgemm(m, n, k, k, n, n, add, a, b, c, false);
}

// A block's rows, (N, D); those from `count` on are zero.
template <class T>
void load(const T* from, int64_t stride, int64_t count, int64_t D, float* to) {
  for (int64_t i = 0; i < N; i++)
    for (int64_t d = 0; d < D; d++) to[i * D + d] = i < count ? read(from[i * stride + d]) : 0;
}

// The same transposed, (D, N), and scaled.
template <class T>
void load_transposed(const T* from, int64_t stride, int64_t count, int64_t D, float scale, float* to) {
  for (int64_t d = 0; d < D; d++)
    for (int64_t i = 0; i < N; i++) to[d * N + i] = i < count ? scale * read(from[i * stride + d]) : 0;
}

template <class T>
void store_transposed(const float* from, const float* scale, int64_t stride, int64_t count, int64_t D, T* to) {
  for (int64_t i = 0; i < count; i++)
    for (int64_t d = 0; d < D; d++) write(from[d * N + i] * scale[i], to[i * stride + d]);
}

// Scores of a block, (N keys, N queries); -∞ where the query does not see the key. The keys begin at `key`.
void scores(const float* k, const float* qt, int64_t D, const int32_t* first, int32_t query, int32_t key, float* s) {
  product(N, N, D, false, k, qt, s);
  if (key != query && key >= first[N - 1]) return;
  for (int32_t i = 0; i < N; i++)
    for (int32_t c = 0; c < N; c++)
      if ((key + i > query + c) | (key + i < first[c])) s[i * N + c] = -std::numeric_limits<float>::infinity();
}

template <class F>
void each(int64_t rows, F f) {  // f(place in (rows, N), its column)
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < N; c++) f(r * N + c, c);
}

struct Scratch {
  float *all, *next;
  explicit Scratch(int64_t size) : all(static_cast<float*>(std::aligned_alloc(64, size * sizeof(float)))), next(all) {}
  ~Scratch() { std::free(all); }
  float* take(int64_t floats) { return (next += floats) - floats; }
};

// The first key that each query sees: that of its document, which begins where positions do not go up by 1.
void first_seen(const int64_t* positions, int64_t L, std::vector<int32_t>& first) {
  first[0] = 0;
  for (int64_t i = 1; i < int64_t(first.size()); i++)
    first[i] = i < L && positions[i] != positions[i - 1] + 1 ? i : first[i - 1];
}

template <class T>
void forward(const T* q, const T* k, const T* v, const int64_t* positions, T* out, float* lse, Sizes sizes, float scale) {
  const int64_t B = sizes.B, L = sizes.L, H = sizes.H, G = sizes.G, D = sizes.D;
  const int64_t blocks = (L + N - 1) / N, padded = blocks * N;
#pragma omp parallel
  {
    Scratch scratch(2 * padded * D + 2 * N * D + N * N + 4 * N);
    float *ks = scratch.take(padded * D), *vt = scratch.take(padded * D), *qt = scratch.take(N * D);
    float *o = scratch.take(N * D), *p = scratch.take(N * N);
    float *top = scratch.take(N), *sum = scratch.take(N), *now = scratch.take(N), *factor = scratch.take(N);
    std::vector<int32_t> first(padded);
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t b = 0; b < B; b++)
      for (int64_t h = 0; h < H; h++) {
        first_seen(positions + b * L, L, first);
        for (int64_t j = 0; j < blocks; j++) {
          const T *key = k + ((b * L + j * N) * G + h / (H / G)) * D, *value = v + (key - k);
          load(key, G * D, L - j * N, D, ks + j * N * D);
          load_transposed(value, G * D, L - j * N, D, 1, vt + j * N * D);
        }
        for (int64_t i = 0; i < blocks; i++) {
          const int64_t at = ((b * L + i * N) * H + h) * D;
          load_transposed(q + at, H * D, L - i * N, D, scale * LOG2_E, qt);
          std::fill_n(o, N * D, 0.0f);
          std::fill_n(top, N, -1e30f);  // not -∞: a query may see nothing of its first block, and -∞ + ∞ is no number
          std::fill_n(sum, N, 0.0f);
          for (int64_t j = first[i * N] / N; j <= i; j++) {
            scores(ks + j * N * D, qt, D, &first[i * N], i * N, j * N, p);
            std::copy_n(top, N, now);
            each(N, [=](int64_t at, int64_t c) { now[c] = now[c] > p[at] ? now[c] : p[at]; });
            for (int64_t c = 0; c < N; c++) {
              factor[c] = power_of_2(top[c] - now[c]);
              top[c] = now[c];
              now[c] = 0;  // from here on the block's sum
            }
            each(N, [=](int64_t at, int64_t c) { now[c] += p[at] = power_of_2(p[at] - top[c]); });
            for (int64_t c = 0; c < N; c++) sum[c] = sum[c] * factor[c] + now[c];
            each(D, [=](int64_t at, int64_t c) { o[at] *= factor[c]; });
            product(D, N, N, true, vt + j * N * D, p, o);
          }
          for (int64_t c = 0; c < N; c++) {
            factor[c] = 1 / sum[c];
            lse[(b * H + h) * padded + i * N + c] = top[c] + std::log2(sum[c]);
          }
          store_transposed(o, factor, H * D, std::min(N, L - i * N), D, out + at);
        }
      }
  }
}

// dV = Pᵀ·dO,  dS = P ∘ (dO·Vᵀ − rowsum(dO ∘ O)),  dQ = scale · dS·K,  dK = scale · dSᵀ·Q
template <class T>
void backward(const T* q, const T* k, const T* v, const int64_t* positions, const T* out, const float* lse, const T* grad,
              T* dq, T* dk, T* dv, Sizes sizes, float scale) {
  const int64_t B = sizes.B, L = sizes.L, H = sizes.H, G = sizes.G, D = sizes.D;
  const int64_t blocks = (L + N - 1) / N, padded = blocks * N;
#pragma omp parallel
  {
    Scratch scratch(7 * padded * D + padded + 3 * N * D + 2 * N * N + N);
    float *qs = scratch.take(padded * D), *qt = scratch.take(padded * D), *dqt = scratch.take(padded * D);
    float *gs = scratch.take(padded * D), *gt = scratch.take(padded * D), *delta = scratch.take(padded);
    float *dks = scratch.take(padded * D), *dvs = scratch.take(padded * D);
    float *ks = scratch.take(N * D), *kt = scratch.take(N * D), *vs = scratch.take(N * D);
    float *p = scratch.take(N * N), *dp = scratch.take(N * N), *scales = scratch.take(N);
    std::fill_n(scales, N, scale);
    std::vector<int32_t> first(padded);
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t b = 0; b < B; b++)
      for (int64_t g = 0; g < G; g++) {
        first_seen(positions + b * L, L, first);
        std::fill_n(dks, padded * D, 0.0f);
        std::fill_n(dvs, padded * D, 0.0f);
        for (int64_t h = g * (H / G); h < (g + 1) * (H / G); h++) {
          std::fill_n(dqt, padded * D, 0.0f);
          for (int64_t i = 0; i < blocks; i++) {
            const int64_t at = ((b * L + i * N) * H + h) * D, to = i * N * D;
            load(q + at, H * D, L - i * N, D, qs + to);
            load_transposed(q + at, H * D, L - i * N, D, scale * LOG2_E, qt + to);
            load(grad + at, H * D, L - i * N, D, gs + to);
            load_transposed(grad + at, H * D, L - i * N, D, 1, gt + to);
            for (int64_t c = 0; c < N; c++) {
              float& sum = delta[i * N + c] = 0;
              if (c < L - i * N)
                for (int64_t d = 0; d < D; d++) sum += gs[to + c * D + d] * read(out[at + c * H * D + d]);
            }
          }
          for (int64_t j = 0; j < blocks; j++) {
            const int64_t at = ((b * L + j * N) * G + g) * D;
            load(k + at, G * D, L - j * N, D, ks);
            load_transposed(k + at, G * D, L - j * N, D, 1, kt);
            load(v + at, G * D, L - j * N, D, vs);
            for (int64_t i = j; i < blocks && first[i * N] < (j + 1) * N; i++) {
              const float* lses = lse + (b * H + h) * padded + i * N;
              scores(ks, qt + i * N * D, D, &first[i * N], i * N, j * N, p);
              each(N, [=](int64_t at, int64_t c) { p[at] = power_of_2(p[at] - lses[c]); });
              product(N, D, N, true, p, gs + i * N * D, dvs + j * N * D);
              product(N, N, D, false, vs, gt + i * N * D, dp);
              each(N, [=](int64_t at, int64_t c) { p[at] *= dp[at] - delta[i * N + c]; });
              product(N, D, N, true, p, qs + i * N * D, dks + j * N * D);
              product(D, N, N, true, kt, p, dqt + i * N * D);
            }
          }
          for (int64_t i = 0; i < blocks; i++)
            store_transposed(dqt + i * N * D, scales, H * D, std::min(N, L - i * N), D,
                             dq + ((b * L + i * N) * H + h) * D);
        }
        for (int64_t i = 0; i < L; i++)
          for (int64_t d = 0; d < D; d++) {
            const int64_t to = ((b * L + i) * G + g) * D + d;
            write(dks[i * D + d] * scale, dk[to]);
            write(dvs[i * D + d], dv[to]);
          }
      }
  }
}

template <class T>
void run(bool backwards, void* const* tensors, Sizes sizes, float scale) {
  const auto of = [&](int i) { return static_cast<T*>(tensors[i]); };
  const auto* positions = static_cast<const int64_t*>(tensors[3]);
  auto* lse = static_cast<float*>(tensors[5]);
  if (backwards)
    backward<T>(of(0), of(1), of(2), positions, of(4), lse, of(6), of(7), of(8), of(9), sizes, scale);
  else
    forward<T>(of(0), of(1), of(2), positions, of(4), lse, sizes, scale);
}

}  // namespace

// The tensors: q, k, v, positions, out, lse; and backwards also the gradients of out, q, k, v.
extern "C" void attention(bool bf16, bool backwards, void* const* tensors, Sizes sizes, float scale) {
  (bf16 ? run<BFloat16> : run<float>)(backwards, tensors, sizes, scale);
}
