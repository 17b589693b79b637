// Matrices that a subgroup holds together: M x K times K x N, added to M x N sums in f32.
//
// With the condition `subgroup_matrix` they are the subgroup matrices of WGSL's experimental extension; the
// sizes and the element are ones the adapter lists: 16, or 8 with `m8`, `n8`, `k8`; f16 with the condition of
// that name, else f32. Without `subgroup_matrix` the same functions are written out, and one invocation plays
// a subgroup (SUBGROUP = 1): slow, and there to run the kernels that use them on any adapter.
//
// The importing file declares E, the workgroup arrays a_staged and b_staged of E and sums_staged of f32, and
// PART, the rows of a subgroup, which has 32 columns.
// Offsets and strides are in elements. `a_along_k`: row r of the left factor begins at r * stride; without it
// its column k begins at k * stride. `b_along_k`: the same of column and row of the right factor.

@if(m8) const M: u32 = 8;
@else const M: u32 = 16;
@if(n8) const N: u32 = 8;
@else const N: u32 = 16;
@if(k8) const K: u32 = 8;
@else const K: u32 = 16;

// Written out, a factor is the place where it lies staged, its offset and stride, and sums are a number.
@if(subgroup_matrix) alias Left = subgroup_matrix_left<E, K, M>;
@else alias Left = vec2u;
@if(subgroup_matrix) alias Right = subgroup_matrix_right<E, N, K>;
@else alias Right = vec2u;
@if(subgroup_matrix) alias Sums = subgroup_matrix_result<f32, N, M>;
@else alias Sums = u32;
@if(!subgroup_matrix) var<private> written_out: array<f32, PART * 32>; // by the number of the sums, then rows

// Sums number i of a subgroup, zero.
@if(subgroup_matrix) fn no_sums(i: u32) -> Sums { return Sums(); }
@else fn no_sums(i: u32) -> Sums { return i; }

// Which subgroup a number belongs to cannot be seen from how it was computed; callers' offsets are the same
// in all invocations of one.
@if(subgroup_matrix) @diagnostic(off, chromium.subgroup_matrix_uniformity)
fn left_at(at: u32, stride: u32) -> Left {
  @if(a_along_k) return subgroupMatrixLoad<Left, row_major>(&a_staged, at, stride);
  @else return subgroupMatrixLoad<Left, col_major>(&a_staged, at, stride);
}
@else fn left_at(at: u32, stride: u32) -> Left { return vec2u(at, stride); }

@if(subgroup_matrix) @diagnostic(off, chromium.subgroup_matrix_uniformity)
fn right_at(at: u32, stride: u32) -> Right {
  @if(b_along_k) return subgroupMatrixLoad<Right, col_major>(&b_staged, at, stride);
  @else return subgroupMatrixLoad<Right, row_major>(&b_staged, at, stride);
}
@else fn right_at(at: u32, stride: u32) -> Right { return vec2u(at, stride); }

@if(subgroup_matrix) @diagnostic(off, chromium.subgroup_matrix_uniformity)
fn multiply_accumulate(x: Left, y: Right, s: Sums) -> Sums {
  return subgroupMatrixMultiplyAccumulate(x, y, s);
}
@else fn multiply_accumulate(x: Left, y: Right, s: Sums) -> Sums {
  for (var i = 0u; i < M * N; i++) {
    var sum = written_out[s * M * N + i];
    for (var k = 0u; k < K; k++) {
      @if(a_along_k) let a = a_staged[x.x + i / N * x.y + k];
      @else let a = a_staged[x.x + k * x.y + i / N];
      @if(b_along_k) let b = b_staged[y.x + i % N * y.y + k];
      @else let b = b_staged[y.x + k * y.y + i % N];
      sum += f32(a) * f32(b);
    }
    written_out[s * M * N + i] = sum;
  }
  return s;
}

// Lays the sums down from `at` on, row by row.
@if(subgroup_matrix) @diagnostic(off, chromium.subgroup_matrix_uniformity)
fn put_sums(s: Sums, at: u32) {
  subgroupMatrixStore<row_major>(&sums_staged, at, s, N);
}
@else fn put_sums(s: Sums, at: u32) {
  for (var i = 0u; i < M * N; i++) { sums_staged[at + i] = written_out[s * M * N + i]; }
}
