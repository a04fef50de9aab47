// What kernels are given: one structure by value, built by problem.py, whose fields are in the same order.
namespace favorsharp {

constexpr int AXES = 8;  // leading axes longer than 1 that a batch may have

// An array of a batch: its address, strides in items (0 along what it is broadcast over).
struct Array {
  i64 start, row, column;
  i64 axis[AXES];
};

// The constants of a side of a map, in the layout of maps.py.
struct Side {
  i64 header, rows, planes;
};

struct Problem {
  Array q, k, v, mask, out, stats, partial_sums;
  Array query_factors, key_factors;  // the part of log features that is of the point alone
  Array kv_in, z_in, c_in;     // a state to begin with
  Array kv_out, z_out, c_out;  // the state of all keys
  Array kv_low_in, z_low_in, kv_low_out, z_low_out;  // low parts of kv and z, where computed in float32
  Array recent_k, recent_v, recent_mask;              // what a state keeps beside its features
  Array recent_k_out, recent_v_out, recent_mask_out;  // what the next one keeps
  i64 shape[AXES];             // of the batch; unused axes have length 1
  i64 map_axis[AXES];          // the number of a head's map is the sum of index * map_axis
  i64 key_axis[AXES];          // that of its key head
  Side query, key;
  i64 m, m_pad, d, e;          // features, and in whole tiles; sizes as given
  i64 gaussian, has_dense, map_rows;
  i64 num_queries, num_keys, first_query, window;
  i64 causal, reverse, normalised;
  i64 limit;                   // keys that enter the features in the end
  i64 recent;                  // keys that are scored exactly by every query
  i64 segments, span;          // of positions
  i64 sums, scratch, totals;   // layouts: tiles.cuh
  i64 padded_d, padded_e, plane_rows, header_size, stages;
  i64 flags, shift;            // of the kernel; how far entering keys lie behind positions
};

// Where a head stands along each axis. There are fewer than 2^31 heads.
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

// Rows and columns of an array's entry of one head.
template <class T> struct View {
  T *start;
  i64 row, column;
  DEVICE T &at(i64 i, i64 j) const { return start[i * row + j * column]; }
};
template <class T, class Index> DEVICE View<T> view(const Array &x, const Index (&index)[AXES]) {
  return {(T *)x.start + (x.start ? along(index, x.axis) : 0), x.row, x.column};
}

}  // namespace favorsharp
