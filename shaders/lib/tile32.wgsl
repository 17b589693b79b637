// Workgroup tiles of 32 rows for kernels that meet 32 rows of their own with 32 other rows, 32 dimensions at
// a time.
//
// 64 invocations: lane (x, y) = (lane % 8, lane / 8) has to do with the own rows y, y + 8, y + 16, y + 24
// and, for dot products, with the other rows x, x + 8, x + 16, x + 24, or, for sums, with the four dimensions
// 4x .. 4x + 3. Rows are interleaved and padded by one vec4 so that the lanes of a GPU's subgroup read
// different banks. 13.5 KiB in all.

const PITCH: u32 = 9u;

var<workgroup> own_tile: array<vec4f, 288>; // [row][vec4]
var<workgroup> other_tile: array<vec4f, 288>; // [row][vec4]
var<workgroup> weight_tile: array<vec4f, 256>; // [other row][y], one component for each own row of y

// Own rows of y, or other rows of x.
fn tile_rows(first: u32, i: u32) -> vec4u {
  return first + i + vec4u(0u, 8u, 16u, 24u);
}

// acc[r][c] += dot(own row r of y, other row c of x) over the 32 dimensions in the tiles.
fn tile_dots(acc: mat4x4f, x: u32, y: u32) -> mat4x4f {
  var sum = acc;
  for (var d = 0u; d < 8u; d++) {
    let others = mat4x4f(other_tile[x * PITCH + d], other_tile[(x + 8u) * PITCH + d],
      other_tile[(x + 16u) * PITCH + d], other_tile[(x + 24u) * PITCH + d]);
    sum[0] += own_tile[y * PITCH + d] * others;
    sum[1] += own_tile[(y + 8u) * PITCH + d] * others;
    sum[2] += own_tile[(y + 16u) * PITCH + d] * others;
    sum[3] += own_tile[(y + 24u) * PITCH + d] * others;
  }
  return sum;
}

// Hands out weights w[r][c] of own row r of y and other row c of x.
fn tile_put_weights(w: mat4x4f, x: u32, y: u32) {
  let by_other = transpose(w);
  weight_tile[x * 8u + y] = by_other[0];
  weight_tile[(x + 8u) * 8u + y] = by_other[1];
  weight_tile[(x + 16u) * 8u + y] = by_other[2];
  weight_tile[(x + 24u) * 8u + y] = by_other[3];
}

// acc[r] += sum over the other rows of weight times their dimensions 4x .. 4x + 3, in the order of the rows.
fn tile_sums(acc: mat4x4f, x: u32, y: u32) -> mat4x4f {
  var sum = acc;
  for (var n = 0u; n < 32u; n++) {
    let other = other_tile[n * PITCH + x];
    let w = weight_tile[n * 8u + y];
    sum[0] += w.x * other;
    sum[1] += w.y * other;
    sum[2] += w.z * other;
    sum[3] += w.w * other;
  }
  return sum;
}
