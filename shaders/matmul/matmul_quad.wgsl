// C[b] = op(A[b]) op(B[b]) (+ bias) (+ C[b]) in f32, for adapters that are emulated on a CPU.
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
// `k_tail`: K is not a multiple of 4. `grouped_rows`: row tile i is (expert, first row, end row, 0) =
// tiles[4 i ..], and the expert picks the matrix of B. `grouped_k`: matrix e sums over k in tiles[e] ..
// tiles[e + 1]. Accumulation: f32, one accumulator per element; the `splits` parts of a long sum are added by
// sum_rows.wgsl.

import package::lib::index::workgroup_index;

@if(a_vec_k || a_vec_m) alias A = vec4f;
@else alias A = f32;
@if(b_vec_n || b_vec_k) alias B = vec4f;
@else alias B = f32;
@if(c_vec) alias C = vec4f;
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
  group: u32,                                 // 4, the rows of a group
}

@group(0) @binding(0) var<storage, read> a: array<A>;
@group(0) @binding(1) var<storage, read> b: array<B>;
@group(0) @binding(2) var<storage, read_write> c: array<C>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read> tiles: array<u32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 32;

// Four k: where they may be read, and which of them count.
struct Step { at: vec4u, live: vec4<bool> }

fn step_at(k: u32, order: vec4u, k_end: u32) -> Step {
  @if(k_tail) return Step(min(k + order, vec4u(k_end - 1u)), k + order < vec4u(k_end));
  @else return Step(k + order, vec4<bool>(true));
}

// One row of op(A) at four k; with a_vec_m four rows at the first of them.
fn load_a(base: u32, at: vec4u, live: vec4<bool>) -> vec4f {
  @if(a_vec_k) let x = a[(base + at.x) / 4u];
  @elif(a_vec_m) let x = a[(base + at.x * params.a_col) / 4u];
  @else let x = load_a4(base + at * params.a_col);
  // The factors of a k past the end are zeroed on both sides: infinity times zero is not zero.
  @if(k_tail && a_vec_m) return select(vec4f(), x, live.x);
  @elif(k_tail) return select(vec4f(), x, live);
  @else return x;
}

@if(!a_vec_k && !a_vec_m) fn load_a4(i: vec4u) -> vec4f {
  return vec4f(a[i.x], a[i.y], a[i.z], a[i.w]);
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
  @elif(b_vec_n) let i = (base.x + s.at * params.b_row) / 4u;
  @else let i = s.at * params.b_row;
  @if(b_vec_k) return transpose(mat4x4f(b[i.x], b[i.y], b[i.z], b[i.w]));
  @elif(b_vec_n) return mat4x4f(counted(b[i.x], s.live.x), counted(b[i.y], s.live.y),
    counted(b[i.z], s.live.z), counted(b[i.w], s.live.w));
  @else return mat4x4f(load_b4(base + i.x, s.live.x), load_b4(base + i.y, s.live.y),
    load_b4(base + i.z, s.live.z), load_b4(base + i.w, s.live.w));
}

@if(!b_vec_n && !b_vec_k) fn load_b4(i: vec4u, live: bool) -> vec4f {
  return counted(vec4f(b[i.x], b[i.y], b[i.z], b[i.w]), live);
}

fn counted(x: vec4f, live: bool) -> vec4f {
  @if(k_tail) return select(vec4f(), x, live);
  @else return x;
}

fn multiply_add(s: mat4x4f, x: mat4x4f, y: mat4x4f) -> mat4x4f {
  return mat4x4f(add_row(s[0], x[0], y), add_row(s[1], x[1], y),
    add_row(s[2], x[2], y), add_row(s[3], x[3], y));
}

fn add_row(s: vec4f, x: vec4f, y: mat4x4f) -> vec4f {
  return fma(vec4f(x.w), y[3], fma(vec4f(x.z), y[2], fma(vec4f(x.y), y[1], fma(vec4f(x.x), y[0], s))));
}

fn column_of(s: mat4x4f, j: u32) -> vec4f {
  return select(select(s[0], s[1], j == 1u), select(s[2], s[3], j == 3u), j >= 2u);
}

fn store(value: vec4f, at: u32, count: u32) {
  var v = value;
  @if(c_vec) {
    @if(accumulate) v += c[at / 4u];
    c[at / 4u] = v;
  }
  @else for (var i = 0u; i < count; i++) {
    @if(accumulate) v[i] += c[at + i];
    c[at + i] = v[i];
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

  @if(grouped_k) var k = tiles[batch];
  @else var k = split * params.split_k;
  @if(grouped_k) let k_end = tiles[batch + 1u];
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
  var added = vec4f();
  @if(bias) let i = min(column + plain, vec4u(params.n - 1u));
  @if(bias) added = vec4f(bias[i.x], bias[i.y], bias[i.z], bias[i.w]);
  @if(a_vec_m) let swap = 0u;
  @else let swap = q;
  // One row of every group per turn. The bound is a uniform so that compilers do not unroll the loop: that
  // would double their time.
  for (var i = 0u; i < params.group; i++) {
    let left = row_end - min(row + i, row_end);
    let at = base + (row + i) * params.c_row;
    if (left > 0u) { store(column_of(s0, i ^ swap) + added, at, count); }
    @if(!rows4) if (left > 4u) { store(column_of(s1, i ^ swap) + added, at + 4u * params.c_row, count); }
    @if(!rows4) if (left > 8u) { store(column_of(s2, i ^ swap) + added, at + 8u * params.c_row, count); }
    @if(!rows4) if (left > 12u) { store(column_of(s3, i ^ swap) + added, at + 12u * params.c_row, count); }
  }
}

// Where the row of op(A) that invocation q loads of a group begins; with a_vec_m all four begin there.
fn row_base(base: u32, first: u32, q: u32, row_end: u32) -> u32 {
  @if(a_vec_m) return base + min(first, (row_end - 1u) / 4u * 4u);
  @else return base + min(first + q, row_end - 1u) * params.a_row;
}
