// C[b] = op(A[b]) op(B[b]) with an epilogue, on the matrix units of GPUs.
//
// op(A) [M, K], op(B) [K, N], C [M, N], with any strides. Four subgroups compute a tile of 64 x 64 (`large`,
// which needs `f16`: eight of them 128 x 128). Per step along k the workgroup stages both factors in
// workgroup memory, as f16 (the condition) where both are stored so, else as f32; every subgroup then adds
// the products of its part, 32 x 32 (64 x 32), matrix by matrix (lib/subgroup_matrix). The sums leave through
// workgroup memory: of those, invocations take four neighbours each, apply the epilogue and store them.
// Entries past an edge are staged as zero, and products with them are not stored.
//
// `a_along_k`: the four neighbours of op(A) that are brought at a time lie along k, and lines of the staged
// factor do; else both go along its rows. `b_along_k`: the same of op(B) and its columns.
//
// The other conditions and the parameters are those of matmul_quad.wgsl. Accumulation: f32, k ascending in
// steps of a matrix, inside of which the hardware decides; the `splits` parts of a long sum are added by
// sum_rows.wgsl.

import package::lib::epilogue::Extra;
import package::lib::index::workgroup_index;
import package::lib::operand::stored_row;
import package::lib::subgroup_matrix::{
  left_at, right_at, multiply_accumulate, no_sums, put_sums, Left, Right, Sums, M, N, K
};
import package::lib::tile_operands::{load_a, load_b, store};

@if(f16) alias E = f16;
@else alias E = f32;
@if(large && f16) const SIZE: u32 = 128;      // rows and columns of a tile
@else const SIZE: u32 = 64;
@if(f16 && !large) const STEP: u32 = 32;      // k per step
@else const STEP: u32 = 16;
@if(large && f16) const PAD: u32 = 0;         // spreads lines over the banks; no room for it
@elif(f16) const PAD: u32 = 8;
@else const PAD: u32 = 4;
@if(large && f16) const ACROSS: u32 = 4;      // subgroups beside each other; two below each other
@else const ACROSS: u32 = 2;
const PART: u32 = SIZE / 2;                   // rows of a subgroup; its columns are 32
const LINE: u32 = STEP + PAD;                 // staged along k: elements from row to row
const ROW: u32 = SIZE + PAD;                  // staged along rows or columns: elements from k to k + 1
const DOWN: u32 = PART / M;                   // matrices of a subgroup
const BESIDE: u32 = 32 / N;

struct Params {
  m: u32, n: u32, k: u32,
  batches: u32,                               // matrices of C, or experts
  row_tiles: u32,                             // tiles of SIZE rows per matrix
  splits: u32, split_k: u32,                  // parts of the sum over k; length of one, a multiple of 4
  a_row: u32, a_col: u32, a_batch: u32,       // strides of op(A), in elements
  b_row: u32, b_col: u32, b_batch: u32,
  c_row: u32, c_batch: u32, c_split: u32,
  b_offset: u32, c_offset: u32,
  per: u32, stored: u32,                      // of gather_a and gather_b: choices per row, and the rows
}

@if(a_half && a_vec) alias A = vec2u;
@elif(a_vec) alias A = vec4f;
@elif(a_half) alias A = u32;
@else alias A = f32;
@if(b_half && b_vec) alias B = vec2u;
@elif(b_vec) alias B = vec4f;
@elif(b_half) alias B = u32;
@else alias B = f32;
@if(c_half) alias C = vec2u;
@elif(c_vec) alias C = vec4f;
@else alias C = f32;

@group(0) @binding(0) var<storage, read> a: array<A>;
@group(0) @binding(1) var<storage, read> b: array<B>;
@group(0) @binding(2) var<storage, read_write> c: array<C>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read> tiles: array<u32>;
@group(0) @binding(5) var<storage, read> table: array<u32>;
@group(0) @binding(6) var<storage, read> extra: array<Extra>;
@group(1) @binding(0) var<uniform> params: Params;

override SUBGROUP: u32 = 32;                  // invocations of a subgroup
override WG: u32 = 128;                       // 4 subgroups, with `large` 8

var<workgroup> a_staged: array<E, SIZE * LINE>;
var<workgroup> b_staged: array<E, SIZE * LINE>;
var<workgroup> sums_staged: array<f32, 2 * ACROSS * M * N>;

// What a workgroup computes: rows row .. row_end, columns from `column` on, where its factors begin.
struct Tile { row: u32, row_end: u32, column: u32, k_end: u32, a: u32, b: u32 }

// Brings four neighbours of op(A), number i of the step that begins at k.
fn stage_a(i: u32, k: u32, t: Tile) {
  @if(a_along_k) let across = i / (STEP / 4u);
  @else let across = i % (SIZE / 4u) * 4u;
  @if(a_along_k) let along = i % (STEP / 4u) * 4u;
  @else let along = i / (SIZE / 4u);
  let row = t.row + across;
  let last = min(row, t.row_end - 1u);        // a row that exists, for the address
  @if(gather_a) let base = t.a + stored_row(last) * params.a_row + (k + along) * params.a_col;
  @else let base = t.a + last * params.a_row + (k + along) * params.a_col;
  @if(a_along_k) let count = select(0u, t.k_end - min(k + along, t.k_end), row < t.row_end);
  @else let count = select(0u, t.row_end - min(row, t.row_end), k + along < t.k_end);
  @if(a_along_k) let x = load_a(base, params.a_col, count);
  @else let x = load_a(base, params.a_row, count);
  @if(a_along_k) let at = across * LINE + along;
  @else let at = along * ROW + across;
  for (var j = 0u; j < 4u; j++) { a_staged[at + j] = E(x[j]); }
}

// The same of op(B).
fn stage_b(i: u32, k: u32, t: Tile) {
  @if(b_along_k) let across = i / (STEP / 4u);
  @else let across = i % (SIZE / 4u) * 4u;
  @if(b_along_k) let along = i % (STEP / 4u) * 4u;
  @else let along = i / (SIZE / 4u);
  let column = t.column + across;
  var line = k + along;
  @if(gather_b) { if (line < t.k_end) { line = stored_row(line); } }
  let base = t.b + line * params.b_row + column * params.b_col;
  @if(b_along_k) let count = select(0u, t.k_end - min(k + along, t.k_end), column < params.n);
  @else let count = select(0u, params.n - min(column, params.n), k + along < t.k_end);
  @if(b_along_k) let x = load_b(base, params.b_row, count);
  @else let x = load_b(base, params.b_col, count);
  @if(b_along_k) let at = across * LINE + along;
  @else let at = along * ROW + across;
  for (var j = 0u; j < 4u; j++) { b_staged[at + j] = E(x[j]); }
}

// Matrix of op(A) at row r and k of the staged tile, and of op(B) at k and column r.
fn left(r: u32, k: u32) -> Left {
  @if(a_along_k) return left_at(r * LINE + k, LINE);
  @else return left_at(k * ROW + r, ROW);
}
fn right(r: u32, k: u32) -> Right {
  @if(b_along_k) return right_at(r * LINE + k, LINE);
  @else return right_at(k * ROW + r, ROW);
}

@compute @workgroup_size(WG)
fn matmul_matrix(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let tile = workgroup_index(wid, nwg);
  let column_tiles = (params.n + SIZE - 1u) / SIZE;
  let row_tile = tile / column_tiles % params.row_tiles;
  let piece = tile / column_tiles / params.row_tiles;
  let split = piece % params.splits;
  let batch = piece / params.splits;
  if (batch >= params.batches) { return; }

  let column = tile % column_tiles * SIZE;
  var row = row_tile * SIZE;
  var row_end = params.m;
  var b_base = params.b_offset + batch * params.b_batch;
  @if(grouped_rows) {
    row = tiles[row_tile * 4u + 1u];
    row_end = tiles[row_tile * 4u + 2u];
    if (row >= row_end) { return; }
    b_base = params.b_offset + tiles[row_tile * 4u] * params.b_batch;
  }
  @if(grouped_k) let k_begin = min(tiles[batch], params.k);
  @else let k_begin = split * params.split_k;
  @if(grouped_k) let k_end = min(tiles[batch + 1u], params.k);
  @else let k_end = min(params.k, k_begin + params.split_k);
  let t = Tile(row, row_end, column, k_end, batch * params.a_batch, b_base);

  let own = lane / SUBGROUP;                  // the number of this subgroup, and where its part begins
  let down = own / ACROSS * PART;
  let beside = own % ACROSS * 32u;
  // Products that are written out must stay in loops whose ends compilers do not know.
  @if(subgroup_matrix) let down_count = DOWN;
  @else let down_count = min(DOWN, params.m);
  @if(subgroup_matrix) let beside_count = BESIDE;
  @else let beside_count = min(BESIDE, params.n);
  var sums: array<Sums, DOWN * BESIDE>;
  for (var i = 0u; i < DOWN * BESIDE; i++) { sums[i] = no_sums(i); }
  for (var k = k_begin; k < k_end; k += STEP) {
    for (var i = lane; i < SIZE * STEP / 4u; i += WG) {
      stage_a(i, k, t);
      stage_b(i, k, t);
    }
    workgroupBarrier();
    for (var d = 0u; d < STEP; d += K) {
      var columns: array<Right, BESIDE>;
      for (var w = 0u; w < beside_count; w++) { columns[w] = right(beside + w * N, d); }
      for (var v = 0u; v < down_count; v++) {
        let rows = left(down + v * M, d);
        for (var w = 0u; w < beside_count; w++) {
          sums[v * BESIDE + w] = multiply_accumulate(rows, columns[w], sums[v * BESIDE + w]);
        }
      }
    }
    workgroupBarrier();
  }

  let base = params.c_offset + batch * params.c_batch + split * params.c_split;
  let staged = own * M * N;
  for (var v = 0u; v < down_count; v++) {
    for (var w = 0u; w < beside_count; w++) {
      put_sums(sums[v * BESIDE + w], staged);
      workgroupBarrier();
      for (var i = lane % SUBGROUP * 4u; i < M * N; i += SUBGROUP * 4u) {
        let at_row = row + down + v * M + i / N;
        let at_column = column + beside + w * N + i % N;
        if (at_row < row_end && at_column < params.n) {
          let at = staged + i;
          let sum = vec4f(sums_staged[at], sums_staged[at + 1u], sums_staged[at + 2u], sums_staged[at + 3u]);
          store(sum, base + at_row * params.c_row + at_column, at_column, min(4u, params.n - at_column));
        }
      }
      workgroupBarrier();
    }
  }
}
