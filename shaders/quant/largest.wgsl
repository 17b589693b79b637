// The largest magnitudes of a matrix, which its scale follows from; and its columns rotated by the random
// Hadamard transform.
//
// x f32 [rows, cols], or bf16 with `halves`; magnitudes are bits, which are ordered as the numbers are, NaN
// above all.
// largest  a stretch of x: one entry of partial per workgroup; `accumulate`: unless a larger one is there
// rotate   y = columns of x, 16 rows at a time, times diag(signs) H / 4, rounded to bf16. H[i][j] is
//          (-1)^popcount(i and j); signs are + + + - + - - - - - - + - + - -. partial gets the largest
//          magnitudes of x, and params.partials entries further on those of y. Rows as in lib/strips
//
// The sums of a rotation have a fixed order: rows 1, 2, 4 and 8 apart.
// Source: "Pretraining Large Language Models with NVFP4" (2025).

import package::lib::index::workgroup_index;
import package::lib::strips::{matrix_of, load4, store4, fetch, magnitudes, largest_of, Matrix, V, X};

override WG: u32 = 16;

struct Params {
  rows: u32, cols: u32,
  block: u32,              // 16, of rotate
  units: u32, each: u32,   // vectors, or strips of a rotation, and how many an invocation takes
  groups: u32,             // workgroups
  first: u32,              // x's entries of partial
  partials: u32,
  per: u32,
}

@group(0) @binding(0) var<storage, read> x: array<X>;
@group(0) @binding(1) var<storage, read_write> y: array<V>;
@group(0) @binding(2) var<storage, read_write> partial: array<u32>;
@group(0) @binding(3) var<storage, read> jobs: array<u32>;
@group(0) @binding(4) var<storage, read> tiles: array<vec4u>;
@group(0) @binding(5) var<storage, read> table: array<u32>;
@group(1) @binding(0) var<uniform> params: Params;

var<workgroup> lanes: array<vec2u, WG>;

// The largest of all invocations, for the first of them.
fn gathered(most: vec2u, lane: u32) -> vec2u {
  lanes[lane] = most;
  workgroupBarrier();
  var all = most;
  if (lane == 0u) {
    for (var i = 1u; i < WG; i++) { all = max(all, lanes[i]); }
  }
  return all;
}

@compute @workgroup_size(WG)
fn largest(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let group = workgroup_index(wid, nwg);
  var most = vec4u();
  var at = params.first + group;
  if (group < params.groups) {
    let m = matrix_of(group);
    @if(jobs) at = m.first;
    for (var i = m.unit + lane; i < m.end; i += WG) { most = max(most, magnitudes(load4(m, 0u, 4u * i))); }
  }
  let all = gathered(vec2u(largest_of(most)), lane).x;
  if (lane != 0u || group >= params.groups) { return; }
  @if(accumulate) partial[at] = max(all, partial[at]);
  @else partial[at] = all;
}

// Sums and differences of rows 1 and 2 apart, in this order.
fn butterfly(m: mat4x4f) -> mat4x4f {
  let a = m[0] + m[1];
  let b = m[0] - m[1];
  let c = m[2] + m[3];
  let d = m[2] - m[3];
  return mat4x4f(a + c, b + d, a - c, b - d);
}

// Four rows of a block with their signs.
fn signed_rows(m: Matrix, row: u32, col: u32, signs: vec4f) -> mat4x4f {
  return mat4x4f(fetch(m, row, col) * signs.x, fetch(m, row + 1u, col) * signs.y,
    fetch(m, row + 2u, col) * signs.z, fetch(m, row + 3u, col) * signs.w);
}

fn largest_in(m: mat4x4f) -> u32 {
  return max(max(largest_of(magnitudes(m[0])), largest_of(magnitudes(m[1]))),
    max(largest_of(magnitudes(m[2])), largest_of(magnitudes(m[3]))));
}

// Stores a quarter of a rotated block and returns its largest magnitude.
fn store_rows(m: Matrix, row: u32, col: u32, v: mat4x4f) -> u32 {
  var most = vec4u();
  for (var r = 0u; r < 4u; r++) {
    var bits = bitcast<vec4u>(0.25 * v[r]);
    let whole = (bits + 0x7fffu + ((bits >> vec4u(16u)) & vec4u(1u))) & vec4u(0xffff0000u);
    bits = select(whole, bits | vec4u(0x400000u), (bits & vec4u(0x7fffffffu)) > vec4u(0x7f800000u));
    store4(m, row + r, col, bitcast<vec4f>(bits));
    most = max(most, bits & vec4u(0x7fffffffu));
  }
  return largest_of(most);
}

@compute @workgroup_size(WG)
fn rotate(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let group = workgroup_index(wid, nwg);
  var plain = 0u;
  var most = 0u;
  if (group < params.groups) {
    let m = matrix_of(group);
    let across = (m.cols + 3u) / 4u;
    for (var i = m.unit + lane; i < m.end; i += WG) {
      let row = i / across * 16u;
      let col = i % across * 4u;
      let v0 = signed_rows(m, row, col, vec4f(1.0, 1.0, 1.0, -1.0));
      let v1 = signed_rows(m, row + 4u, col, vec4f(1.0, -1.0, -1.0, -1.0));
      let v2 = signed_rows(m, row + 8u, col, vec4f(-1.0, -1.0, -1.0, 1.0));
      let v3 = signed_rows(m, row + 12u, col, vec4f(-1.0, 1.0, -1.0, -1.0));
      plain = max(plain, max(max(largest_in(v0), largest_in(v1)), max(largest_in(v2), largest_in(v3))));
      let w0 = butterfly(v0);
      let w1 = butterfly(v1);
      let w2 = butterfly(v2);
      let w3 = butterfly(v3);
      let a = w0 + w1;
      let b = w0 - w1;
      let c = w2 + w3;
      let d = w2 - w3;
      most = max(most, store_rows(m, row, col, a + c));
      most = max(most, store_rows(m, row + 4u, col, b + d));
      most = max(most, store_rows(m, row + 8u, col, a - c));
      most = max(most, store_rows(m, row + 12u, col, b - d));
    }
  }
  let all = gathered(vec2u(plain, most), lane);
  if (lane != 0u || group >= params.groups) { return; }
  partial[params.first + group] = all.x;
  partial[params.first + params.partials + group] = all.y;
}
