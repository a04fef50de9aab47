// The structure that forward kernels take by value. problem.py builds it, with the same fields in the same order.
namespace favorsharp {

constexpr int AXES = 8;  // the most leading axes longer than 1 that a batch may have

// An array: its address, and its strides in items along rows, columns and the axes of the batch. A stride is 0 along an
// axis over which the array is broadcast.
struct Array {
  i64 start, row, column;
  i64 axis[AXES];
};

// The addresses of the constants of one side of the maps, whose layouts maps.py describes.
struct Side {
  i64 header, rows, planes;
};

struct Problem {
  Array q, k, v, mask, out, stats, partial_sums;
  Array query_factors, key_factors;  // the part of log features that depends only on the point
  Array kv_in, z_in, c_in;     // the sums of a state to start from
  Array kv_out, z_out, c_out;  // the sums after all keys
  Array kv_low_in, z_low_in, kv_low_out, z_low_out;  // low parts of kv and z, if computed in float32
  Array recent_k, recent_v, recent_mask;              // the recent keys of a state, which are not in its sums
  Array recent_k_out, recent_v_out, recent_mask_out;  // the recent keys of the next state
  i64 shape[AXES];             // of the batch; unused axes have length 1
  i64 map_axis[AXES];          // the number of a head's map is the sum of index * map_axis
  i64 key_axis[AXES];          // the number of its key head is the sum of index * key_axis
  Side query, key;
  i64 m, m_pad, d, e;          // features, features in whole tiles; sizes of points and values
  i64 gaussian, has_dense, map_rows;
  i64 num_queries, num_keys, first_query, window;
  i64 causal, reverse, normalised;
  i64 limit;                   // number of keys that have entered the sums in the end
  i64 recent;                  // number of recent keys, which every query scores exactly
  i64 segments, span;          // number of segments of positions, positions in each; or as a kernel says
  i64 sums, scratch, totals;   // addresses of intermediate sums; tiles.cuh has the layouts
  i64 padded_d, padded_e, plane_rows, header_size, stages;
  i64 flags, shift;            // flags of the kernel; how far entering keys lie behind the positions
};

// The index of a head along each axis of the batch. There are fewer than 2^31 heads.
template <class Index> DEVICE void split_head(const Problem &p, i64 head, Index (&index)[AXES]) {
  u32 rest = (u32)head;
#pragma unroll
  for (int a = AXES - 1; a >= 0; a--) {
    const u32 size = (u32)p.shape[a];
    index[a] = rest % size;
    rest /= size;
  }
}
template <class Index> DEVICE i64 along(const Index (&index)[AXES], const i64 (&axis)[AXES]) {
  i64 sum = 0;
#pragma unroll
  for (int a = 0; a < AXES; a++) sum += index[a] * axis[a];
  return sum;
}

// The rows and columns of an array that belong to one head.
template <class T> struct View {
  T *start;
  i64 row, column;
  DEVICE T &at(i64 i, i64 j) const { return start[i * row + j * column]; }
};
template <class T, class Index> DEVICE View<T> view(const Array &x, const Index (&index)[AXES]) {
  return {(T *)x.start + (x.start ? along(index, x.axis) : 0), x.row, x.column};
}

}  // namespace favorsharp
