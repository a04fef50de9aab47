// How kernels find the arrays of a head. The structures `Array` and `Problem` are declared in host/declarations.py.
namespace favorsharp {

// The index of a head along each axis of the batch. There are fewer than 2^31 heads.
template <class Index> DEVICE void split_head(const Problem &p, i64 head, Index (&index)[AXES]) {
  u32 rest = (u32)head;
#pragma unroll
  for (int a = AXES - 1; a >= 0; a--) {
    const u32 size = (u32)p.shape[a];
    index[a] = 0;
    if (size == 1) continue;  // most axes have length 1; this saves two divisions
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
