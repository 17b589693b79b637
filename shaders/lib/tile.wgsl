// Register tiles: eight rows by eight columns of f32 sums, each row two quads (vec4f) of columns.
//
// With the condition `vec4` row lengths are multiples of four and buffers are arrays of vec4f: the second
// quad of a tile that sticks out is moved back inside, so that it repeats values of the first, and neither
// loads nor stores need a guard. Without it, quads are put together from single elements, and what lies
// outside is zero.

struct Tile {
  r0: vec4f, r1: vec4f, r2: vec4f, r3: vec4f, r4: vec4f, r5: vec4f, r6: vec4f, r7: vec4f, // columns 0 to 3
  s0: vec4f, s1: vec4f, s2: vec4f, s3: vec4f, s4: vec4f, s5: vec4f, s6: vec4f, s7: vec4f, // columns 4 to 7
}

// Adds the outer product of eight rows (a, b) and eight columns (x, y): 64 multiply-adds.
fn add_outer(tile: ptr<function, Tile>, a: vec4f, b: vec4f, x: vec4f, y: vec4f) {
  (*tile).r0 += a.x * x; (*tile).s0 += a.x * y;
  (*tile).r1 += a.y * x; (*tile).s1 += a.y * y;
  (*tile).r2 += a.z * x; (*tile).s2 += a.z * y;
  (*tile).r3 += a.w * x; (*tile).s3 += a.w * y;
  (*tile).r4 += b.x * x; (*tile).s4 += b.x * y;
  (*tile).r5 += b.y * x; (*tile).s5 += b.y * y;
  (*tile).r6 += b.z * x; (*tile).s6 += b.z * y;
  (*tile).r7 += b.w * x; (*tile).s7 += b.w * y;
}

// Adds to each row k the dot products of row k of (A, B) with the eight rows of (X, Y): 256 multiply-adds.
// WGSL's matrices are lists of columns; here each vec4f of a matrix is a row.
fn add_dots(tile: ptr<function, Tile>, A: mat4x4f, B: mat4x4f, X: mat4x4f, Y: mat4x4f) {
  (*tile).r0 += A[0] * X; (*tile).s0 += A[0] * Y;
  (*tile).r1 += A[1] * X; (*tile).s1 += A[1] * Y;
  (*tile).r2 += A[2] * X; (*tile).s2 += A[2] * Y;
  (*tile).r3 += A[3] * X; (*tile).s3 += A[3] * Y;
  (*tile).r4 += B[0] * X; (*tile).s4 += B[0] * Y;
  (*tile).r5 += B[1] * X; (*tile).s5 += B[1] * Y;
  (*tile).r6 += B[2] * X; (*tile).s6 += B[2] * Y;
  (*tile).r7 += B[3] * X; (*tile).s7 += B[3] * Y;
}

// The sums as a list, quad by quad and row by row, for a loop that stores them.
fn sums_of(t: Tile) -> array<vec4f, 16> {
  return array<vec4f, 16>(
    t.r0, t.s0, t.r1, t.s1, t.r2, t.s2, t.r3, t.s3, t.r4, t.s4, t.r5, t.s5, t.r6, t.s6, t.r7, t.s7);
}

// The quad after the one that begins at `first`, in a row of `width` elements.
@if(vec4) fn next_quad(first: u32, width: u32) -> u32 {
  return min(first + 4u, width - 4u);
}
@else fn next_quad(first: u32, width: u32) -> u32 {
  return first + 4u;
}

// The four indices from `first` on, those past `last` replaced by it.
fn four(first: u32, last: u32) -> vec4u {
  return min(first + vec4u(0u, 1u, 2u, 3u), vec4u(last));
}

// Which of the four indices from `first` on are below `limit`.
fn below(first: u32, limit: u32) -> vec4<bool> {
  return first + vec4u(0u, 1u, 2u, 3u) < vec4u(limit);
}

// Where four elements from `first` on of a row of `width` lie, those past its end at its last element.
fn quad_indices(row: u32, first: u32, width: u32) -> vec4u {
  return row * width + four(first, width - 1u);
}

// Row and column of cell k of a lower triangle: (0,0) (1,0) (1,1) (2,0) ... sqrt may be off by one row.
fn triangle(k: u32) -> vec2u {
  var row = u32((sqrt(8.0 * f32(k) + 1.0) - 1.0) * 0.5);
  if (row * (row + 1u) / 2u > k) {
    row--;
  }
  if ((row + 1u) * (row + 2u) / 2u <= k) {
    row++;
  }
  return vec2u(row, k - row * (row + 1u) / 2u);
}
