// Pages between arena and pinned host memory, and the page indices of every layer.
//
// Each function launches one kernel on `stream` and returns its cudaError_t. Page ids and counts
// lie in device memory and the grid is fixed, so a launch can be captured in a CUDA graph and
// replayed with other pages. A page that is not to be copied has the source id -1. Only
// orbitflow_copy_runs launches nothing: it asks the copy engine, with ids in host memory.

#include <cuda_runtime.h>
#include <stdint.h>

namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // words of a thread: what crosses a link takes its time

// A block's threads copy `words` words of 16 bytes, of each of them kInFlight at once.
template <typename Load>
__device__ void copy_words(int4* __restrict__ out, const int4* __restrict__ in, int64_t words,
                           Load load) {
  int64_t word = threadIdx.x;
  for (; word + (kInFlight - 1) * blockDim.x < words; word += kInFlight * blockDim.x) {
    int4 held[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) held[i] = load(in + word + i * blockDim.x);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) __stcs(out + word + i * blockDim.x, held[i]);
  }
  for (; word < words; word += blockDim.x) __stcs(out + word, load(in + word));
}

// One block copies a page at a time, 16 bytes a thread. The memory on either side may be pinned
// host memory: it is read and written where it lies. Host memory is streamed past the caches.
__global__ void copy_pages_kernel(int4* __restrict__ target, const int4* __restrict__ source,
                                  const int32_t* __restrict__ target_ids,
                                  const int32_t* __restrict__ source_ids,
                                  const int32_t* __restrict__ count, int64_t words) {
  const int32_t pages = *count;
  for (int32_t page = blockIdx.x; page < pages; page += gridDim.x) {
    const int64_t from = source_ids[page];
    if (from < 0) continue;
    const int4* __restrict__ in = source + from * words;
    int4* __restrict__ out = target + static_cast<int64_t>(target_ids[page]) * words;
    copy_words(out, in, words, [](const int4* word) { return __ldcs(word); });
  }
}

// Rows of a step's new K or V that make up whole pages: page i is `rows_per_page` rows from
// first_rows[i] on, of `words` words each page.
__global__ void copy_rows_kernel(int4* __restrict__ target, const int4* __restrict__ source,
                                 const int32_t* __restrict__ target_ids,
                                 const int32_t* __restrict__ first_rows,
                                 const int32_t* __restrict__ count, int64_t words,
                                 int64_t words_per_row) {
  const int32_t pages = *count;
  for (int32_t page = blockIdx.x; page < pages; page += gridDim.x) {
    const int4* __restrict__ in = source + first_rows[page] * words_per_row;
    int4* __restrict__ out = target + static_cast<int64_t>(target_ids[page]) * words;
    copy_words(out, in, words, [](const int4* word) { return __ldg(word); });
  }
}

// indices[layer, i] = table[layer, p], p the logical page of position i: request r has positions
// indptr[r] to indptr[r + 1], and its k-th page is that of token k * page_size.
__global__ void layer_indices_kernel(int32_t* __restrict__ indices, int64_t stride,
                                     const int32_t* __restrict__ table, int64_t pages,
                                     const int32_t* __restrict__ req_to_token, int64_t row_tokens,
                                     const int32_t* __restrict__ rows,
                                     const int32_t* __restrict__ indptr, int32_t page_size) {
  const int32_t request = blockIdx.y;
  const int32_t layer = blockIdx.z;
  const int32_t begin = indptr[request];
  const int32_t length = indptr[request + 1] - begin;
  const int32_t* __restrict__ slots = req_to_token + rows[request] * row_tokens;
  for (int32_t k = blockIdx.x * blockDim.x + threadIdx.x; k < length;
       k += gridDim.x * blockDim.x) {
    const int32_t logical = slots[static_cast<int64_t>(k) * page_size] / page_size;
    indices[layer * stride + begin + k] = table[layer * pages + logical];
  }
}

}  // namespace

extern "C" {

int orbitflow_copy_pages(void* target, const void* source, const int32_t* target_ids,
                         const int32_t* source_ids, const int32_t* count, int64_t page_bytes,
                         int32_t blocks, cudaStream_t stream) {
  if (page_bytes % sizeof(int4) != 0) return cudaErrorInvalidValue;
  copy_pages_kernel<<<blocks, kThreads, 0, stream>>>(
      static_cast<int4*>(target), static_cast<const int4*>(source), target_ids, source_ids, count,
      page_bytes / sizeof(int4));
  return cudaGetLastError();
}

// Pages to[i] of the target = of[i] of the source, in one copy for each run of both.
int orbitflow_copy_runs(char* target, const char* source, const int64_t* to, const int64_t* of,
                        int64_t pages, int64_t page_bytes, cudaStream_t stream) {
  for (int64_t begin = 0, end; begin < pages; begin = end) {
    for (end = begin + 1; end < pages; ++end) {
      if (to[end] != to[end - 1] + 1 || of[end] != of[end - 1] + 1) break;
    }
    const cudaError_t error =
        cudaMemcpyAsync(target + to[begin] * page_bytes, source + of[begin] * page_bytes,
                        (end - begin) * page_bytes, cudaMemcpyDefault, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

int orbitflow_copy_rows(void* target, const void* source, const int32_t* target_ids,
                        const int32_t* first_rows, const int32_t* count, int64_t page_bytes,
                        int64_t row_bytes, int32_t blocks, cudaStream_t stream) {
  if (page_bytes % sizeof(int4) != 0 || row_bytes % sizeof(int4) != 0) return cudaErrorInvalidValue;
  copy_rows_kernel<<<blocks, kThreads, 0, stream>>>(
      static_cast<int4*>(target), static_cast<const int4*>(source), target_ids, first_rows, count,
      page_bytes / sizeof(int4), row_bytes / sizeof(int4));
  return cudaGetLastError();
}

int orbitflow_layer_indices(int32_t* indices, int64_t stride, const int32_t* table, int64_t layers,
                            int64_t pages, const int32_t* req_to_token, int64_t row_tokens,
                            const int32_t* rows, const int32_t* indptr, int32_t requests,
                            int32_t page_size, int32_t blocks, cudaStream_t stream) {
  if (requests <= 0) return cudaSuccess;
  const dim3 grid(blocks, requests, static_cast<unsigned>(layers));
  layer_indices_kernel<<<grid, kThreads, 0, stream>>>(indices, stride, table, pages, req_to_token,
                                                      row_tokens, rows, indptr, page_size);
  return cudaGetLastError();
}

}  // extern "C"
