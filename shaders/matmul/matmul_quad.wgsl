// C[b] = op(A[b]) op(B[b]) (+ bias) (+ C[b]) in f32, for adapters that are emulated on a CPU.
//
// op(A) [M, K], op(B) [K, N], C [M, N]; op is the identity or the transpose. A quad (four invocations) computes a tile of
// 16 rows x 16 columns, all of it in registers: no workgroup memory, no barrier. One workgroup computes WG / 4 tiles.
//
// Per step of four k, invocation q loads its own four columns of op(B) and, for each group of four rows, one row of
// op(A). Three quad swaps show it the other three rows, in the order q, q^1, q^2, q^3, so column j of an accumulator is
// row q ^ j of its group. A load costs twenty fused multiply-adds on such an adapter; here 32 loads feed 256.
//
// Layout conditions (what is contiguous in memory, in steps of vec4f): a_vec_k or a_vec_m, b_vec_n or b_vec_k, c_vec; without
// them scalars with any strides. With a_vec_m an invocation loads four rows at its own k + q, the swaps show it k + (q ^ j),
// and it reads the rows of op(B) in the same order: rows are plain, sums run over k in a different (fixed) order.
// `k_tail` when K is not a multiple of 4. `grouped_rows`: row tile i is described by tiles[i] = (expert, first row, end
// row, 0), and the expert picks the matrix of B. `grouped_k`: matrix e sums over k in tiles[e].x .. tiles[e + 1].x.
// Accumulation: f32, one accumulator per element, k ascending within `splits` parts that are summed by sum_rows.wgsl.

import package::lib::index::workgroup_index;

@if(a_vec_k || a_vec_m) alias A = vec4f;
@else alias A = f32;
@if(b_vec_n || b_vec_k) alias B = vec4f;
@else alias B = f32;
@if(c_vec) alias C = vec4f;
@else alias C = f32;

struct Params {
  m: u32, n: u32, k: u32,
  batches: u32,                               // matrices of C, or experts
  row_tiles: u32,                             // tiles of 16 rows per matrix
  splits: u32, split_k: u32,                  // parts of the sum and their length, a multiple of 4
  a_row: u32, a_col: u32, a_batch: u32,       // strides of op(A), in elements
  b_row: u32, b_col: u32, b_batch: u32,
  c_row: u32, c_batch: u32, c_split: u32,
  a_offset: u32, b_offset: u32, c_offset: u32,
}

@group(0) @binding(0) var<storage, read> a: array<A>;
@group(0) @binding(1) var<storage, read> b: array<B>;
@group(0) @binding(2) var<storage, read_write> c: array<C>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read> tiles: array<u32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 32;

// Where a step of four k begins: positions in k that may be read, and which of them count.
struct Step { at: vec4u, live: vec4<bool> }

fn step_at(k: u32, first: vec4u, k_end: u32) -> Step {
  @if(k_tail) return Step(min(k + first, vec4u(k_end - 1u)), k + first < vec4u(k_end));
  @else return Step(k + first, vec4<bool>(true));
}

// One row of op(A) at four k (a_vec_m: four rows at one k) from where the row (the column) begins.
fn load_a(base: u32, s: Step) -> vec4f {
  @if(a_vec_k) let x = a[(base + s.at.x) / 4u];
  @elif(a_vec_m) let x = a[(base + s.at.x * params.a_col) / 4u];
  @else let x = load_scalars(base + s.at * params.a_col);
  @if(k_tail && a_vec_m) return select(vec4f(), x, s.live.x);
  @elif(k_tail) return select(vec4f(), x, s.live);
  @else return x;
}

@if(!a_vec_k && !a_vec_m) fn load_scalars(i: vec4u) -> vec4f {
  return vec4f(a[i.x], a[i.y], a[i.z], a[i.w]);
}

// Four columns of op(B) at four k; column j of the result is k number j.
fn load_b(columns: vec4u, s: Step) -> mat4x4f {
  @if(b_vec_k) {
    let i = (columns + s.at.x) / 4u;
    return transpose(mat4x4f(b[i.x], b[i.y], b[i.z], b[i.w]));
  }
  @elif(b_vec_n) {
    let i = (columns.x + s.at * params.b_row) / 4u;
    return mat4x4f(load_row(i.x, s.live.x), load_row(i.y, s.live.y), load_row(i.z, s.live.z), load_row(i.w, s.live.w));
  }
  @else {
    let i = s.at * params.b_row;
    return mat4x4f(load_row4(columns + i.x, s.live.x), load_row4(columns + i.y, s.live.y),
      load_row4(columns + i.z, s.live.z), load_row4(columns + i.w, s.live.w));
  }
}

// The factor of a k past the end is zeroed on both sides: infinity times zero is not zero.
@if(b_vec_n) fn load_row(i: u32, live: bool) -> vec4f {
  @if(k_tail) return select(vec4f(), b[i], live);
  @else return b[i];
}

@if(!b_vec_n && !b_vec_k) fn load_row4(i: vec4u, live: bool) -> vec4f {
  let x = vec4f(b[i.x], b[i.y], b[i.z], b[i.w]);
  @if(k_tail) return select(vec4f(), x, live);
  @else return x;
}

// What the quad loaded, as four (row, k) vectors: j is row q ^ j (a_vec_m: row j, with k in the order q ^ 0 .. q ^ 3).
@diagnostic(off, subgroup_uniformity) fn spread(x: vec4f) -> mat4x4f {
  let rows = mat4x4f(x, quadSwapX(x), quadSwapY(x), quadSwapDiagonal(x));
  @if(a_vec_m) return transpose(rows);
  @else return rows;
}

fn multiply_add(s: mat4x4f, x: mat4x4f, y: mat4x4f) -> mat4x4f {
  return mat4x4f(add_row(s[0], x[0], y), add_row(s[1], x[1], y), add_row(s[2], x[2], y), add_row(s[3], x[3], y));
}

fn add_row(s: vec4f, x: vec4f, y: mat4x4f) -> vec4f {
  return fma(vec4f(x.w), y[3], fma(vec4f(x.z), y[2], fma(vec4f(x.y), y[1], fma(vec4f(x.x), y[0], s))));
}

// Where one matrix of C begins, and what of it this tile may write.
struct Target { base: u32, row_end: u32, column: u32 }

fn store(row: u32, value: vec4f, t: Target) {
  if (row >= t.row_end || t.column >= params.n) { return; }
  let at = t.base + row * params.c_row + t.column;
  var v = value;
  @if(bias) {
    let last = params.n - 1u;
    v += vec4f(bias[t.column], bias[min(t.column + 1u, last)], bias[min(t.column + 2u, last)], bias[min(t.column + 3u, last)]);
  }
  @if(c_vec) {
    @if(accumulate) v += c[at / 4u];
    c[at / 4u] = v;
  }
  @else {
    for (var i = 0u; i < min(4u, params.n - t.column); i++) {
      @if(accumulate) v[i] += c[at + i];
      c[at + i] = v[i];
    }
  }
}

fn store_group(row: u32, s: mat4x4f, order: vec4u, t: Target) {
  store(row + order.x, s[0], t);
  store(row + order.y, s[1], t);
  store(row + order.z, s[2], t);
  store(row + order.w, s[3], t);
}

@compute @workgroup_size(WG)
fn matmul_quad(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u) {
  let tile = workgroup_index(wid, nwg) * (WG / 4u) + lane / 4u;
  let column_tiles = (params.n + 15u) / 16u;
  let row_tile = tile / column_tiles % params.row_tiles;
  let part = tile / column_tiles / params.row_tiles;
  let split = part % params.splits;
  let batch = part / params.splits;
  if (batch >= params.batches) { return; }

  let q = lane % 4u;
  let order = vec4u(q) ^ vec4u(0u, 1u, 2u, 3u);
  var row = row_tile * 16u;
  var row_end = params.m;
  var b_base = params.b_offset + batch * params.b_batch;
  @if(grouped_rows) {
    let group = row_tile * 4u;
    row = tiles[group + 1u];
    row_end = tiles[group + 2u];
    if (row >= row_end) { return; }
    b_base = params.b_offset + tiles[group] * params.b_batch;
  }
  let column = tile % column_tiles * 16u + q * 4u;

  // Rows and columns past the edge read the last one again; they are not stored.
  let a_base = params.a_offset + batch * params.a_batch;
  let last = row_end - 1u;
  @if(a_vec_m) let a_rows = a_base + min(row + vec4u(0u, 4u, 8u, 12u), vec4u(last / 4u * 4u));
  @else let a_rows = a_base + min(row + q + vec4u(0u, 4u, 8u, 12u), vec4u(last)) * params.a_row;
  @if(b_vec_n) let b_columns = vec4u(b_base + min(column, (params.n - 1u) / 4u * 4u));
  @else let b_columns = b_base + min(column + vec4u(0u, 1u, 2u, 3u), vec4u(params.n - 1u)) * params.b_col;

  @if(grouped_k) var k = tiles[batch];
  @else var k = split * params.split_k;
  @if(grouped_k) let k_end = tiles[batch + 1u];
  @else let k_end = min(params.k, k + params.split_k);
  @if(a_vec_m) let first = order;
  @else let first = vec4u(0u, 1u, 2u, 3u);

  var s0 = mat4x4f();
  var s1 = mat4x4f();
  var s2 = mat4x4f();
  var s3 = mat4x4f();
  for (; k < k_end; k += 4u) {
    let now = step_at(k, first, k_end);
    let y = load_b(b_columns, now);
    s0 = multiply_add(s0, spread(load_a(a_rows.x, now)), y);
    s1 = multiply_add(s1, spread(load_a(a_rows.y, now)), y);
    s2 = multiply_add(s2, spread(load_a(a_rows.z, now)), y);
    s3 = multiply_add(s3, spread(load_a(a_rows.w, now)), y);
  }

  let target_ = Target(params.c_offset + batch * params.c_batch + split * params.c_split, row_end, column);
  @if(a_vec_m) let rows = vec4u(0u, 1u, 2u, 3u);
  @else let rows = order;
  store_group(row, s0, rows, target_);
  store_group(row + 4u, s1, rows, target_);
  store_group(row + 8u, s2, rows, target_);
  store_group(row + 12u, s3, rows, target_);
}

