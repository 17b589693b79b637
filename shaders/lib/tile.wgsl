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
