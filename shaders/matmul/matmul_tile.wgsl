// C[b] = op(A[b]) op(B[b]) (+ bias) (+ C[b]) in f32, for GPUs.
//
// op(A) [M, K], op(B) [K, N], C [M, N], with any strides. One workgroup of 16 x 16 invocations computes a
// tile of 64 rows x 64 columns: steps of 16 k of both factors are staged in workgroup memory, and every
// invocation keeps 4 x 4 sums. Staged vectors run along the rows of op(A) and along the columns of op(B);
// lines of 17 vectors spread them over the memory banks. Entries past an edge are staged as zero, and
// products with them are not stored.
//
// Conditions `grouped_rows`, `grouped_k`, `bias`, `accumulate` and the parameters are those of
// matmul_quad.wgsl. Accumulation: f32, one accumulator per element, k ascending; the `splits` parts of a long
// sum are added by sum_rows.wgsl.

import package::lib::index::workgroup_index;

const TILE: u32 = 64;
const STEP: u32 = 16;
const LINE: u32 = 17;

struct Params {
  m: u32, n: u32, k: u32,
  batches: u32,                               // matrices of C, or experts
  row_tiles: u32,                             // tiles of 64 rows per matrix
  splits: u32, split_k: u32,                  // parts of the sum over k, and the length of one
  a_row: u32, a_col: u32, a_batch: u32,       // strides of op(A), in elements
  b_row: u32, b_col: u32, b_batch: u32,
  c_row: u32, c_batch: u32, c_split: u32,
  b_offset: u32, c_offset: u32,
}

@group(0) @binding(0) var<storage, read> a: array<f32>;
@group(0) @binding(1) var<storage, read> b: array<f32>;
@group(0) @binding(2) var<storage, read_write> c: array<f32>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read> tiles: array<u32>;
@group(1) @binding(0) var<uniform> params: Params;

var<workgroup> a_staged: array<vec4f, STEP * LINE>;
var<workgroup> b_staged: array<vec4f, STEP * LINE>;

// Four neighbours in a column of op(A), of which `count` exist; the others are zero.
fn load_a(base: u32, count: u32) -> vec4f {
  var x = vec4f();
  for (var i = 0u; i < 4u; i++) {
    if (i < count) { x[i] = a[base + i * params.a_row]; }
  }
  return x;
}

// The same in a row of op(B).
fn load_b(base: u32, count: u32) -> vec4f {
  var x = vec4f();
  for (var i = 0u; i < 4u; i++) {
    if (i < count) { x[i] = b[base + i * params.b_col]; }
  }
  return x;
}

@compute @workgroup_size(16, 16)
fn matmul_tile(
  @builtin(local_invocation_index) lane: u32, @builtin(local_invocation_id) lid: vec3u,
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
) {
  let tile = workgroup_index(wid, nwg);
  let column_tiles = (params.n + TILE - 1u) / TILE;
  let row_tile = tile / column_tiles % params.row_tiles;
  let part = tile / column_tiles / params.row_tiles;
  let split = part % params.splits;
  let batch = part / params.splits;
  if (batch >= params.batches) { return; }

  let column = tile % column_tiles * TILE;
  var row = row_tile * TILE;
  var row_end = params.m;
  var b_base = params.b_offset + batch * params.b_batch;
  @if(grouped_rows) {
    row = tiles[row_tile * 4u + 1u];
    row_end = tiles[row_tile * 4u + 2u];
    if (row >= row_end) { return; }
    b_base = params.b_offset + tiles[row_tile * 4u] * params.b_batch;
  }
  @if(grouped_k) let k_begin = tiles[batch];
  @else let k_begin = split * params.split_k;
  @if(grouped_k) let k_end = tiles[batch + 1u];
  @else let k_end = min(params.k, k_begin + params.split_k);

  // Which vector of each factor this invocation stages: neighbours read neighbours in memory.
  let major = lane / 16u;
  let minor = lane % 16u;
  let a_along_k = params.a_col == 1u;
  let a_k = select(major, minor, a_along_k);
  let a_vector = select(minor, major, a_along_k);
  let b_along_k = params.b_row == 1u;
  let b_k = select(major, minor, b_along_k);
  let b_vector = select(minor, major, b_along_k);
  let a_first = row + a_vector * 4u;
  let b_first = column + b_vector * 4u;
  let a_count = row_end - min(a_first, row_end);
  let b_count = params.n - min(b_first, params.n);
  let a_at = batch * params.a_batch + a_first * params.a_row;
  let b_at = b_base + b_first * params.b_col;

  var sum = mat4x4f();                        // column i: row i of the 4 x 4 block
  for (var k = k_begin; k < k_end; k += STEP) {
    let a_live = select(0u, a_count, k + a_k < k_end);
    let b_live = select(0u, b_count, k + b_k < k_end);
    a_staged[a_k * LINE + a_vector] = load_a(a_at + (k + a_k) * params.a_col, a_live);
    b_staged[b_k * LINE + b_vector] = load_b(b_at + (k + b_k) * params.b_row, b_live);
    workgroupBarrier();
    for (var i = 0u; i < STEP; i++) {
      let x = a_staged[i * LINE + lid.y];
      let y = b_staged[i * LINE + lid.x];
      sum[0] = fma(vec4f(x.x), y, sum[0]);
      sum[1] = fma(vec4f(x.y), y, sum[1]);
      sum[2] = fma(vec4f(x.z), y, sum[2]);
      sum[3] = fma(vec4f(x.w), y, sum[3]);
    }
    workgroupBarrier();
  }

  let base = params.c_offset + batch * params.c_batch + split * params.c_split;
  for (var i = 0u; i < 4u; i++) {
    for (var j = 0u; j < 4u; j++) {
      let at_row = row + lid.y * 4u + i;
      let at_column = column + lid.x * 4u + j;
      if (at_row < row_end && at_column < params.n) {
        let at = base + at_row * params.c_row + at_column;
        var value = sum[i][j];
        @if(bias) value += bias[at_column];
        @if(accumulate) value += c[at];
        c[at] = value;
      }
    }
  }
}
