// C[b] = op(A[b]) op(B[b]) with an epilogue, for GPUs.
//
// op(A) [M, K], op(B) [K, N], C [M, N], with any strides. One workgroup of 16 x 16 invocations computes a
// tile of 64 x 64 (`large`: 128 x 128). Per step of 16 (8) k every invocation brings four neighbours of each
// factor into workgroup memory, and then adds to its 4 x 4 sums (2 x 2 blocks of them, 64 apart).
//
// `a_along_k`: the four neighbours of op(A) lie along k, else along its rows; `b_along_k`: those of op(B) lie
// along k, else along its columns. What lies along k is staged line by line, the lines of every fourth row or
// column together, and lines are one vector longer than the step, so that the invocations of a row of the
// workgroup read different banks. `a_vec`, `b_vec`: four neighbours are one vector in memory. Entries past an
// edge are staged as zero, and products with them are not stored.
//
// `f16`: factors are staged and multiplied in f16, and the sums of a step are added to f32; a step in which
// one of them leaves the range of f16 is done again in f32.
//
// The other conditions and the parameters are those of matmul_quad.wgsl. Accumulation: f32, one accumulator
// per element, k ascending; the `splits` parts of a long sum are added by sum_rows.wgsl.

@if(!f16) import package::lib::block4::multiply_add;
import package::lib::epilogue::Extra;
import package::lib::index::workgroup_index;
import package::lib::operand::stored_row;
import package::lib::tile_operands::{load_a, load_b, store};

@if(f16) alias Row4 = vec4<f16>;              // what is staged
@else alias Row4 = vec4f;
@if(f16) alias Block4 = mat4x4<f16>;
@else alias Block4 = mat4x4f;
@if(large) const BLOCKS: u32 = 2;             // 4 x 4 blocks of an invocation, per side
@else const BLOCKS: u32 = 1;
const SIZE: u32 = 64 * BLOCKS;
const VECTORS: u32 = 4 / BLOCKS;              // of a step along k
const LINE: u32 = VECTORS + 1;
const ROW: u32 = SIZE / 4 + 1;                // staged along rows or columns: vectors from k to k + 1

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

var<workgroup> a_staged: array<Row4, SIZE * LINE>;
var<workgroup> b_staged: array<Row4, SIZE * LINE>;

// Which four neighbours an invocation brings: the number across k, the number along k, and how many exist.
struct Share { across: u32, k: u32, at: u32 }

// Lanes that are neighbours read neighbours in memory.
fn share(lane: u32, along_k: bool) -> Share {
  if (along_k) {
    let line = lane / VECTORS;
    let place = line / 64u * 64u + line % 4u * 16u + line % 64u / 4u;
    return Share(line, lane % VECTORS * 4u, place * LINE + lane % VECTORS);
  }
  let k = lane / (SIZE / 4u);
  return Share(lane % (SIZE / 4u) * 4u, k, k * ROW + lane % (SIZE / 4u));
}

// Block number `which` of an invocation at four k: each column of the result is one row of op(A).
fn rows_a(k: u32, which: u32, y: u32) -> Block4 {
  @if(a_along_k) let i = (which * 64u + y) * LINE + k;
  @else let i = k * 4u * ROW + which * 16u + y;
  @if(a_along_k) return Block4(a_staged[i], a_staged[i + 16u * LINE],
    a_staged[i + 32u * LINE], a_staged[i + 48u * LINE]);
  @else return transpose(Block4(a_staged[i], a_staged[i + ROW],
    a_staged[i + 2u * ROW], a_staged[i + 3u * ROW]));
}

// The same of op(B): each column of the result is one k.
fn columns_b(k: u32, which: u32, x: u32) -> Block4 {
  @if(b_along_k) let i = (which * 64u + x) * LINE + k;
  @else let i = k * 4u * ROW + which * 16u + x;
  @if(b_along_k) return transpose(Block4(b_staged[i], b_staged[i + 16u * LINE],
    b_staged[i + 32u * LINE], b_staged[i + 48u * LINE]));
  @else return Block4(b_staged[i], b_staged[i + ROW], b_staged[i + 2u * ROW], b_staged[i + 3u * ROW]);
}

// s + x y in f16.
@if(f16) fn multiply_add(s: Block4, x: Block4, y: Block4) -> Block4 {
  return Block4(add_row(s[0], x[0], y), add_row(s[1], x[1], y), add_row(s[2], x[2], y),
    add_row(s[3], x[3], y));
}
@if(f16) fn add_row(s: Row4, x: Row4, y: Block4) -> Row4 {
  return fma(Row4(x.w), y[3], fma(Row4(x.z), y[2], fma(Row4(x.y), y[1], fma(Row4(x.x), y[0], s))));
}

// The same in f32.
@if(f16) fn add_wide(s: mat4x4f, x: Block4, y: Block4) -> mat4x4f {
  let z = mat4x4f(y);
  return s + mat4x4f(z * vec4f(x[0]), z * vec4f(x[1]), z * vec4f(x[2]), z * vec4f(x[3]));
}

@if(f16) fn in_range(s: Block4) -> bool {
  let most = Row4(65504.0h);
  return all(abs(s[0]) < most) && all(abs(s[1]) < most) && all(abs(s[2]) < most) && all(abs(s[3]) < most);
}

@compute @workgroup_size(16, 16)
fn matmul_tile(
  @builtin(local_invocation_index) lane: u32, @builtin(local_invocation_id) lid: vec3u,
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
) {
  let tile = workgroup_index(wid, nwg);
  let column_tiles = (params.n + SIZE - 1u) / SIZE;
  let row_tile = tile / column_tiles % params.row_tiles;
  let part = tile / column_tiles / params.row_tiles;
  let split = part % params.splits;
  let batch = part / params.splits;
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

  @if(a_along_k) let mine_a = share(lane, true);
  @else let mine_a = share(lane, false);
  @if(b_along_k) let mine_b = share(lane, true);
  @else let mine_b = share(lane, false);
  let first = row + mine_a.across;
  let last = min(first, row_end - 1u);        // a row that exists, for the address
  @if(gather_a) let a_at = batch * params.a_batch + stored_row(last) * params.a_row;
  @else let a_at = batch * params.a_batch + last * params.a_row;
  let b_first = column + mine_b.across;
  let b_at = b_base + b_first * params.b_col;

  var sums: array<mat4x4f, BLOCKS * BLOCKS>;  // column i of a block: its row i
  for (var k = k_begin; k < k_end; k += 4u * VECTORS) {
    let a_k = k + mine_a.k;
    let b_k = k + mine_b.k;
    @if(a_along_k) let a_count = select(0u, k_end - min(a_k, k_end), first < row_end);
    @else let a_count = select(0u, row_end - min(first, row_end), a_k < k_end);
    @if(b_along_k) let b_count = select(0u, k_end - min(b_k, k_end), b_first < params.n);
    @else let b_count = select(0u, params.n - min(b_first, params.n), b_k < k_end);
    @if(a_along_k) a_staged[mine_a.at] = Row4(load_a(a_at + a_k * params.a_col, params.a_col, a_count));
    @else a_staged[mine_a.at] = Row4(load_a(a_at + a_k * params.a_col, params.a_row, a_count));
    var b_line = b_k;
    @if(gather_b) { if (b_k < k_end) { b_line = stored_row(b_k); } }
    @if(b_along_k) b_staged[mine_b.at] = Row4(load_b(b_at + b_line * params.b_row, params.b_row, b_count));
    @else b_staged[mine_b.at] = Row4(load_b(b_at + b_line * params.b_row, params.b_col, b_count));
    workgroupBarrier();
    @if(f16) {
      var parts = array<Block4, BLOCKS * BLOCKS>();
      for (var i = 0u; i < VECTORS; i++) {
        for (var v = 0u; v < BLOCKS; v++) {
          let x = rows_a(i, v, lid.y);
          for (var w = 0u; w < BLOCKS; w++) {
            parts[v * BLOCKS + w] = multiply_add(parts[v * BLOCKS + w], x, columns_b(i, w, lid.x));
          }
        }
      }
      for (var j = 0u; j < BLOCKS * BLOCKS; j++) {
        if (in_range(parts[j])) { sums[j] += mat4x4f(parts[j]); }
        else {
          for (var i = 0u; i < VECTORS; i++) {
            let x = rows_a(i, j / BLOCKS, lid.y);
            sums[j] = add_wide(sums[j], x, columns_b(i, j % BLOCKS, lid.x));
          }
        }
      }
    }
    @else for (var i = 0u; i < VECTORS; i++) {
      for (var v = 0u; v < BLOCKS; v++) {
        let x = rows_a(i, v, lid.y);
        for (var w = 0u; w < BLOCKS; w++) {
          sums[v * BLOCKS + w] = multiply_add(sums[v * BLOCKS + w], x, columns_b(i, w, lid.x));
        }
      }
    }
    workgroupBarrier();
  }

  let base = params.c_offset + batch * params.c_batch + split * params.c_split;
  for (var v = 0u; v < BLOCKS; v++) {
    for (var i = 0u; i < 4u; i++) {
      let at_row = row + v * 64u + lid.y * 4u + i;
      for (var w = 0u; w < BLOCKS; w++) {
        let at_column = column + w * 64u + lid.x * 4u;
        if (at_row < row_end && at_column < params.n) {
          let count = min(4u, params.n - at_column);
          store(sums[v * BLOCKS + w][i], base + at_row * params.c_row + at_column, at_column, count);
        }
      }
    }
  }
}
