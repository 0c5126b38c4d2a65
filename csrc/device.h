#pragma once

/// Before a function that both host and device code call.
#if defined(__CUDACC__)
  #define JMM_HOST_DEVICE __host__ __device__ __forceinline__
#else
  #define JMM_HOST_DEVICE [[gnu::always_inline]] inline
#endif
