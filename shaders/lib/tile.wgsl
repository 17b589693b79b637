// Register tiles of eight rows by eight columns, held as two quads (vec4f) of columns.
//
// With the condition `vec4` row lengths are multiples of four and buffers are arrays of vec4f: the second quad of a tile that
// sticks out is moved back inside, so that it repeats values of the first, and neither loads nor stores need a guard.
// Without it, quads are put together from single elements, and what lies outside is zero.

// The quad after the one that begins at `first`, in a row of `width` elements.
@if(vec4) fn next_quad(first: u32, width: u32) -> u32 {
  return min(first + 4u, width - 4u);
}
@else fn next_quad(first: u32, width: u32) -> u32 {
  return first + 4u;
}

// Which of the indices first, ..., first + 3 are below `limit`.
fn below(first: u32, limit: u32) -> vec4<bool> {
  return first + vec4u(0u, 1u, 2u, 3u) < vec4u(limit);
}

// Where the elements first, ..., first + 3 of a row of `width` elements lie, those past its end at its last element.
fn quad_indices(row: u32, first: u32, width: u32) -> vec4u {
  return row * width + min(first + vec4u(0u, 1u, 2u, 3u), vec4u(width - 1u));
}

// Row and column of the k-th cell of a lower triangle, (0,0) (1,0) (1,1) (2,0) ...; sqrt may be off by one row.
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

// Eight rows by two quads of f32 sums.
struct Tile {
  r0: vec4f, r1: vec4f, r2: vec4f, r3: vec4f, r4: vec4f, r5: vec4f, r6: vec4f, r7: vec4f,
  s0: vec4f, s1: vec4f, s2: vec4f, s3: vec4f, s4: vec4f, s5: vec4f, s6: vec4f, s7: vec4f,
}

// tile += (wa, wb) (outer) (x0, x1).
fn add_outer(tile: ptr<function, Tile>, wa: vec4f, wb: vec4f, x0: vec4f, x1: vec4f) {
  (*tile).r0 += wa.x * x0; (*tile).s0 += wa.x * x1;
  (*tile).r1 += wa.y * x0; (*tile).s1 += wa.y * x1;
  (*tile).r2 += wa.z * x0; (*tile).s2 += wa.z * x1;
  (*tile).r3 += wa.w * x0; (*tile).s3 += wa.w * x1;
  (*tile).r4 += wb.x * x0; (*tile).s4 += wb.x * x1;
  (*tile).r5 += wb.y * x0; (*tile).s5 += wb.y * x1;
  (*tile).r6 += wb.z * x0; (*tile).s6 += wb.z * x1;
  (*tile).r7 += wb.w * x0; (*tile).s7 += wb.w * x1;
}

// The sums of row k: columns 0 to 3 and 4 to 7.
fn tile_row(t: Tile, k: u32) -> array<vec4f, 2> {
  let sums = array<array<vec4f, 2>, 8>(array(t.r0, t.s0), array(t.r1, t.s1), array(t.r2, t.s2), array(t.r3, t.s3),
    array(t.r4, t.s4), array(t.r5, t.s5), array(t.r6, t.s6), array(t.r7, t.s7));
  return sums[k];
}

fn tile_sums(t: Tile) -> array<vec4f, 16> {
  return array<vec4f, 16>(t.r0, t.s0, t.r1, t.s1, t.r2, t.s2, t.r3, t.s3, t.r4, t.s4, t.r5, t.s5, t.r6, t.s6, t.r7, t.s7);
}
