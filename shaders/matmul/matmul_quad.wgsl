// C[b] = op(A[b]) op(B[b]) with an epilogue, for adapters that are emulated on a CPU.
//
// op(A) [M, K], op(B) [K, N], C [M, N]; op is the identity or the transpose. A quad (four invocations)
// computes a tile of 16 rows x 16 columns (`rows4`: 4 rows), all of it in registers: no workgroup memory, no
// barrier. One workgroup computes WG / 4 tiles.
//
// Per step of four k, invocation q loads its own four columns of op(B) and, of each group of four rows, one
// row of op(A). Three quad swaps show it the rows of its neighbours in the order q ^ 0 .. q ^ 3, so column j
// of an accumulator is row q ^ j of its group. On such an adapter a load costs twenty multiply-adds; here 32
// loads feed 256. The kernel exists only under the condition `subgroups`, and relies on invocations 4 i .. 4
// i + 3 of a workgroup being a quad, as they are in a workgroup of one dimension.
//
// Layout conditions say what is contiguous, in steps of vec4f: a_vec_k or a_vec_m, b_vec_n or b_vec_k, c_vec;
// without them elements are read one by one at any stride. With a_vec_m an invocation loads four rows at its
// own k + q, the swaps show it k + (q ^ j), and it reads the rows of op(B) in that order: rows are plain
// then, and the order of the sum over k differs between invocations, but is fixed. a_vec_m and b_vec_k
// exclude each other.
//
// `a_half`, `b_half`, `c_half`: the matrix is stored in 16 bits, two elements per word; with `a_bf16`,
// `b_bf16`, `c_bf16` they are bf16, else f16, and are decoded where they are loaded. C is then in vectors.
//
// `k_tail`: K is not a multiple of 4. `grouped_rows`: row tile i is (expert, first row, end row, 0) =
// tiles[4 i ..], and the expert picks the matrix of B. `grouped_k`: matrix e sums over k in tiles[e] ..
// tiles[e + 1]. `gather_a`, `gather_b`: row r of A (row k of B) is row floor(table[r] / per) of the stored
// matrix. `bias`, `accumulate` and the conditions of lib/epilogue change what is stored. Accumulation: f32,
// one accumulator per element; the `splits` parts of a long sum are added by sum_rows.wgsl.
import package::lib::index::workgroup_index;
import package::lib::block4::column_of;
import package::lib::block4::multiply_add;
import package::lib::epilogue::{Extra, finished};
import package::lib::operand::{a_pair, b_pair, c_pack, stored_row};

@if(a_half && a_vec_k || a_half && a_vec_m) alias A = vec2u;
@elif(a_vec_k || a_vec_m) alias A = vec4f;
@elif(a_half) alias A = u32;
@else alias A = f32;
@if(b_half && b_vec_n || b_half && b_vec_k) alias B = vec2u;
@elif(b_vec_n || b_vec_k) alias B = vec4f;
@elif(b_half) alias B = u32;
@else alias B = f32;
@if(c_half) alias C = vec2u;
@elif(c_vec) alias C = vec4f;
@else alias C = f32;
@if(rows4) const ROWS: u32 = 4;
@else const ROWS: u32 = 16;

struct Params {
  m: u32, n: u32, k: u32,
  batches: u32,                               // matrices of C, or experts
  row_tiles: u32,                             // tiles of ROWS rows per matrix
  splits: u32, split_k: u32,                  // parts of the sum over k; length of one, a multiple of 4
  a_row: u32, a_col: u32, a_batch: u32,       // strides of op(A), in elements
  b_row: u32, b_col: u32, b_batch: u32,
  c_row: u32, c_batch: u32, c_split: u32,
  b_offset: u32, c_offset: u32,
  group: u32, groups: u32,                    // rows of a group, 4; groups of a tile, ROWS / 4
  per: u32, stored: u32,                      // of gather_a and gather_b: choices per row, and the rows
}

@group(0) @binding(0) var<storage, read> a: array<A>;
@group(0) @binding(1) var<storage, read> b: array<B>;
@group(0) @binding(2) var<storage, read_write> c: array<C>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read> tiles: array<u32>;
@group(0) @binding(5) var<storage, read> table: array<u32>;
@group(0) @binding(6) var<storage, read> extra: array<Extra>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 16;

// Four k: where they may be read in A and in B, and which of them count.
struct Step { at: vec4u, at_b: vec4u, live: vec4<bool> }

fn step_at(k: u32, order: vec4u, k_end: u32) -> Step {
  @if(k_tail) let at = min(k + order, vec4u(k_end - 1u));
  @else let at = k + order;
  @if(gather_b) let at_b = vec4u(stored_row(at.x), stored_row(at.y), stored_row(at.z), stored_row(at.w));
  @else let at_b = at;
  @if(k_tail) return Step(at, at_b, k + order < vec4u(k_end));
  @else return Step(at, at_b, vec4<bool>(true));
}

// One row of op(A) at four k; with a_vec_m four rows at the first of them.
fn load_a(base: u32, at: vec4u, live: vec4<bool>) -> vec4f {
  @if(a_vec_k) let x = a_vector(a[(base + at.x) / 4u]);
  @elif(a_vec_m) let x = a_vector(a[(base + at.x * params.a_col) / 4u]);
  @else let x = load_a4(base + at * params.a_col);
  // The factors of a k past the end are zeroed on both sides: infinity times zero is not zero.
  @if(k_tail && a_vec_m) return select(vec4f(), x, live.x);
  @elif(k_tail) return select(vec4f(), x, live);
  @else return x;
}

@if(a_vec_k || a_vec_m) fn a_vector(x: A) -> vec4f {
  @if(a_half) return vec4f(a_pair(x.x), a_pair(x.y));
  @else return x;
}
@else fn load_a4(i: vec4u) -> vec4f {
  @if(a_half) return vec4f(a_element(i.x), a_element(i.y), a_element(i.z), a_element(i.w));
  @else return vec4f(a[i.x], a[i.y], a[i.z], a[i.w]);
}

@if(a_half && !a_vec_k && !a_vec_m) fn a_element(i: u32) -> f32 {
  let pair = a_pair(a[i / 2u]);
  return select(pair.x, pair.y, i % 2u == 1u);
}

// Four rows at four k: column j is row q ^ j (a_vec_m: row j, its k in the order q ^ 0 .. q ^ 3).
// Quads enter and leave loops as a whole, which the uniformity analysis cannot see.
@if(subgroups) @diagnostic(off, subgroup_uniformity)
fn load_rows(base: u32, s: Step) -> mat4x4f {
  let x = load_a(base, s.at, s.live);
  let rows = mat4x4f(x, quadSwapX(x), quadSwapY(x), quadSwapDiagonal(x));
  @if(a_vec_m) return transpose(rows);
  @else return rows;
}

// Four columns of op(B) at four k; column j of the result is k number j.
fn load_columns(base: vec4u, s: Step) -> mat4x4f {
  @if(b_vec_k) let i = (base + s.at.x) / 4u;
  @elif(b_vec_n) let i = (base.x + s.at_b * params.b_row) / 4u;
  @else let i = s.at_b * params.b_row;
  @if(b_vec_k) return transpose(mat4x4f(
    b_vector(b[i.x]), b_vector(b[i.y]), b_vector(b[i.z]), b_vector(b[i.w])));
  @elif(b_vec_n) return mat4x4f(counted(b_vector(b[i.x]), s.live.x), counted(b_vector(b[i.y]), s.live.y),
    counted(b_vector(b[i.z]), s.live.z), counted(b_vector(b[i.w]), s.live.w));
  @else return mat4x4f(load_b4(base + i.x, s.live.x), load_b4(base + i.y, s.live.y),
    load_b4(base + i.z, s.live.z), load_b4(base + i.w, s.live.w));
}

@if(b_vec_n || b_vec_k) fn b_vector(x: B) -> vec4f {
  @if(b_half) return vec4f(b_pair(x.x), b_pair(x.y));
  @else return x;
}
@else fn load_b4(i: vec4u, live: bool) -> vec4f {
  @if(b_half) let x = vec4f(b_element(i.x), b_element(i.y), b_element(i.z), b_element(i.w));
  @else let x = vec4f(b[i.x], b[i.y], b[i.z], b[i.w]);
  return counted(x, live);
}

@if(b_half && !b_vec_n && !b_vec_k) fn b_element(i: u32) -> f32 {
  let pair = b_pair(b[i / 2u]);
  return select(pair.x, pair.y, i % 2u == 1u);
}

fn counted(x: vec4f, live: bool) -> vec4f {
  @if(k_tail) return select(vec4f(), x, live);
  @else return x;
}

// The epilogue of four neighbours in a row, of which `count` exist.
fn store(sum: vec4f, at: u32, count: u32) {
  var more = vec4f();
  @if(relu2_of && c_vec || residual && c_vec) more = extra[at / 4u];
  @elif(relu2_of || residual) for (var j = 0u; j < count; j++) { more[j] = extra[at + j]; }
  var value = finished(sum, more);
  @if(c_half) c[at / 4u] = c_pack(value);
  @elif(c_vec) {
    @if(accumulate) value += c[at / 4u];
    c[at / 4u] = value;
  }
  @else for (var j = 0u; j < count; j++) {
    @if(accumulate) value[j] += c[at + j];
    c[at + j] = value[j];
  }
}

@if(subgroups) @compute @workgroup_size(WG)
fn matmul_quad(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let tile = workgroup_index(wid, nwg) * (WG / 4u) + lane / 4u;
  let column_tiles = (params.n + 15u) / 16u;
  let row_tile = tile / column_tiles % params.row_tiles;
  let part = tile / column_tiles / params.row_tiles;
  let split = part % params.splits;
  let batch = part / params.splits;
  if (batch >= params.batches) { return; }

  let q = lane % 4u;
  let plain = vec4u(0u, 1u, 2u, 3u);
  let column = tile % column_tiles * 16u + q * 4u;
  var row = row_tile * ROWS;
  var row_end = params.m;
  var b_base = params.b_offset + batch * params.b_batch;
  @if(grouped_rows) {
    row = tiles[row_tile * 4u + 1u];
    row_end = tiles[row_tile * 4u + 2u];
    if (row >= row_end) { return; }
    b_base = params.b_offset + tiles[row_tile * 4u] * params.b_batch;
  }

  // Rows and columns past the edge read the last one again; they are not stored.
  let a_base = batch * params.a_batch;
  let rows0 = row_base(a_base, row, q, row_end);
  @if(!rows4) let rows1 = row_base(a_base, row + 4u, q, row_end);
  @if(!rows4) let rows2 = row_base(a_base, row + 8u, q, row_end);
  @if(!rows4) let rows3 = row_base(a_base, row + 12u, q, row_end);
  @if(b_vec_n) let columns = vec4u(b_base + min(column, (params.n - 1u) / 4u * 4u));
  @else let columns = b_base + min(column + plain, vec4u(params.n - 1u)) * params.b_col;

  @if(grouped_k) var k = min(tiles[batch], params.k);
  @else var k = split * params.split_k;
  @if(grouped_k) let k_end = min(tiles[batch + 1u], params.k);
  @else let k_end = min(params.k, k + params.split_k);
  @if(a_vec_m) let k_order = vec4u(q) ^ plain;
  @else let k_order = plain;

  var s0 = mat4x4f();
  @if(!rows4) var s1 = mat4x4f();
  @if(!rows4) var s2 = mat4x4f();
  @if(!rows4) var s3 = mat4x4f();
  for (; k < k_end; k += 4u) {
    let now = step_at(k, k_order, k_end);
    let y = load_columns(columns, now);
    s0 = multiply_add(s0, load_rows(rows0, now), y);
    @if(!rows4) s1 = multiply_add(s1, load_rows(rows1, now), y);
    @if(!rows4) s2 = multiply_add(s2, load_rows(rows2, now), y);
    @if(!rows4) s3 = multiply_add(s3, load_rows(rows3, now), y);
  }
  if (column >= params.n) { return; }
  let base = params.c_offset + batch * params.c_batch + split * params.c_split + column;
  let count = min(4u, params.n - column);
  @if(bias) let i = min(column + plain, vec4u(params.n - 1u));
  @if(!bias) let added = vec4f();
  @else let added = vec4f(bias[i.x], bias[i.y], bias[i.z], bias[i.w]);
  @if(a_vec_m) let swap = 0u;
  @else let swap = q;
  // The bounds are uniforms so that compilers do not unroll the loops: that would double their time.
  for (var g = 0u; g < params.groups; g++) {
    for (var i = 0u; i < params.group; i++) {
      let at_row = row + 4u * g + i;
      if (at_row < row_end) {
        store(column_of(s0, i ^ swap) + added, base + at_row * params.c_row, count);
      }
    }
    @if(!rows4) { s0 = s1; s1 = s2; s2 = s3; }
  }
}

// Where the row of op(A) that invocation q loads of a group begins; with a_vec_m all four begin there.
fn row_base(base: u32, first: u32, q: u32, row_end: u32) -> u32 {
  @if(a_vec_m) return base + min(first, (row_end - 1u) / 4u * 4u);
  @elif(gather_a) return base + stored_row(min(first + q, row_end - 1u)) * params.a_row;
  @else return base + min(first + q, row_end - 1u) * params.a_row;
}
