// dCB_ij = sum over the heads of a group of (dy_i . x_j) exp(a_i - a_j) dt_j for i >= j, 0 for i < j.
//
// dy and x [B,L,H,P], dt and dA_cumsum (= a) [B,H,nC,Q], dCB [B,nC,G,Q,Q]; f32 sums in order of h, then p.
// Pairs of different documents are 0 (start [B,nC,Q], see document_start.wgsl).
//
// `below_diagonal`: one invocation computes a tile of 8 i by 8 j strictly below the diagonal tiles, or fills
// the tile that mirrors it. There the decay is split into exp(a_i - a_i0) exp(a_i0 - a_j), both with
// exponents <= 0, and multiplied into dy and x, so that one set of sums serves all heads. `diagonal`: one
// invocation computes a quarter (4 by 4) of a diagonal tile, where no such split exists.

import package::lib::index::workgroup_index;
import package::lib::tile::{Tile, add_dots, sums_of, next_quad, four, below, quad_indices, triangle};

struct Params {
  seqlen: u32,
  nheads: u32,
  headdim: u32,
  ngroups: u32,
  nchunks: u32,
  chunk_size: u32,
  // batch * nchunks * ngroups * T (T - 1) (below_diagonal) or 4 T (diagonal), T = ceil(chunk_size / 8)
  total: u32,
}

@if(vec4) @group(0) @binding(0) var<storage, read> dy: array<vec4f>;
@else @group(0) @binding(0) var<storage, read> dy: array<f32>;
@if(vec4) @group(0) @binding(1) var<storage, read> x: array<vec4f>;
@else @group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> dt: array<f32>;
@group(0) @binding(3) var<storage, read> dA_cumsum: array<f32>;
@group(0) @binding(4) var<storage, read> start: array<i32>; // read with the condition `documents` only
@if(vec4) @group(0) @binding(5) var<storage, read_write> dCB: array<vec4f>;
@else @group(0) @binding(5) var<storage, read_write> dCB: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

@if(vec4) fn load_dy(row: u32, p: u32) -> vec4f {
  return dy[(row * params.headdim + p) / 4u];
}
@else fn load_dy(row: u32, p: u32) -> vec4f {
  let at = quad_indices(row, p, params.headdim);
  return select(vec4f(), vec4f(dy[at.x], dy[at.y], dy[at.z], dy[at.w]), below(p, params.headdim));
}

@if(vec4) fn load_x(row: u32, p: u32) -> vec4f {
  return x[(row * params.headdim + p) / 4u];
}
@else fn load_x(row: u32, p: u32) -> vec4f {
  let at = quad_indices(row, p, params.headdim);
  return select(vec4f(), vec4f(x[at.x], x[at.y], x[at.z], x[at.w]), below(p, params.headdim));
}

fn dy_rows(rows: vec4u, p: u32, weight: vec4f) -> mat4x4f {
  return mat4x4f(weight.x * load_dy(rows.x, p), weight.y * load_dy(rows.y, p),
    weight.z * load_dy(rows.z, p), weight.w * load_dy(rows.w, p));
}

fn x_rows(rows: vec4u, p: u32, weight: vec4f) -> mat4x4f {
  return mat4x4f(weight.x * load_x(rows.x, p), weight.y * load_x(rows.y, p),
    weight.z * load_x(rows.z, p), weight.w * load_x(rows.w, p));
}

fn load_dt(at: vec4u) -> vec4f {
  return vec4f(dt[at.x], dt[at.y], dt[at.z], dt[at.w]);
}

fn load_a(at: vec4u) -> vec4f {
  return vec4f(dA_cumsum[at.x], dA_cumsum[at.y], dA_cumsum[at.z], dA_cumsum[at.w]);
}

struct Chunk {
  b: u32,
  c: u32,
  g: u32,
  row: u32, // of its first position, in [B * L]
  length: u32, // positions that exist
}

// matrix = (b * nchunks + c) * ngroups + g
fn chunk_of(matrix: u32) -> Chunk {
  let c = matrix / params.ngroups % params.nchunks;
  let b = matrix / (params.ngroups * params.nchunks);
  let first = c * params.chunk_size;
  let length = min(params.chunk_size, params.seqlen - first);
  return Chunk(b, c, matrix % params.ngroups, b * params.seqlen + first, length);
}

// Stores columns j, ..., j + 3 of row i, zero across documents.
fn store(at: Chunk, i: u32, j: u32, value: vec4f) {
  if (i >= params.chunk_size) {
    return;
  }
  var kept = value;
  @if(documents) {
    let begin = start[(at.b * params.nchunks + at.c) * params.chunk_size + i];
    kept = select(kept, vec4f(), vec4i(i32(j)) + vec4i(0, 1, 2, 3) < vec4i(begin));
  }
  let matrix = (at.b * params.nchunks + at.c) * params.ngroups + at.g;
  let first = (matrix * params.chunk_size + i) * params.chunk_size + j;
  @if(vec4) {
    dCB[first / 4u] = kept;
  }
  @else {
    for (var k = 0u; k < 4u && j + k < params.chunk_size; k++) {
      dCB[first + k] = kept[k];
    }
  }
}

@compute @workgroup_size(WG)
fn below_diagonal(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * WG + lane;
  if (id >= params.total) {
    return;
  }
  let tiles = (params.chunk_size + 7u) / 8u;
  let lower = tiles * (tiles - 1u) / 2u;
  let k = id % (2u * lower);
  let at = chunk_of(id / (2u * lower));
  let place = triangle(k % lower);
  let i0 = 8u * select(place.y, place.x + 1u, k < lower);
  let j0 = 8u * select(place.x + 1u, place.y, k < lower);
  let j1 = next_quad(j0, params.chunk_size);
  // Positions past the end repeat the last one; their weight is zero.
  let ia = four(i0, at.length - 1u);
  let ib = four(i0 + 4u, at.length - 1u);
  let ja = four(j0, at.length - 1u);
  let jb = four(j1, at.length - 1u);

  var tile = Tile();
  let heads = select(0u, params.nheads / params.ngroups, i0 > j0 && i0 < at.length);
  for (var h = at.g * heads; h < (at.g + 1u) * heads; h++) {
    let steps = ((at.b * params.nheads + h) * params.nchunks + at.c) * params.chunk_size;
    let a = dA_cumsum[steps + i0];
    let fa = select(vec4f(), exp(min(load_a(steps + ia) - a, vec4f())), below(i0, at.length));
    let fb = select(vec4f(), exp(min(load_a(steps + ib) - a, vec4f())), below(i0 + 4u, at.length));
    let ga = exp(min(a - load_a(steps + ja), vec4f())) * load_dt(steps + ja);
    let gb = exp(min(a - load_a(steps + jb), vec4f())) * load_dt(steps + jb);
    let da = (at.row + ia) * params.nheads + h;
    let db = (at.row + ib) * params.nheads + h;
    let xa = (at.row + ja) * params.nheads + h;
    let xb = (at.row + jb) * params.nheads + h;
    for (var p = 0u; p < params.headdim; p += 4u) {
      add_dots(&tile, dy_rows(da, p, fa), dy_rows(db, p, fb), x_rows(xa, p, ga), x_rows(xb, p, gb));
    }
  }
  let sums = sums_of(tile);
  for (var r = 0u; r < 8u; r++) {
    store(at, i0 + r, j0, sums[2u * r]);
    store(at, i0 + r, j1, sums[2u * r + 1u]);
  }
}

@compute @workgroup_size(WG)
fn diagonal(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * WG + lane;
  if (id >= params.total) {
    return;
  }
  let quarters = 4u * ((params.chunk_size + 7u) / 8u);
  let k = id % quarters;
  let at = chunk_of(id / quarters);
  let i0 = k / 4u * 8u + k / 2u % 2u * 4u;
  let j0 = k / 4u * 8u + k % 2u * 4u;
  if (i0 >= params.chunk_size || j0 >= params.chunk_size) {
    return;
  }
  let i = four(i0, at.length - 1u);
  let j = four(j0, at.length - 1u);
  var sum = mat4x4f(); // its column r is row i0 + r
  let heads = select(0u, params.nheads / params.ngroups, i0 >= j0 && i0 < at.length);
  for (var h = at.g * heads; h < (at.g + 1u) * heads; h++) {
    let d = (at.row + i) * params.nheads + h;
    let xr = (at.row + j) * params.nheads + h;
    var U = mat4x4f();
    for (var p = 0u; p < params.headdim; p += 4u) {
      U += transpose(x_rows(xr, p, vec4f(1.0))) * dy_rows(d, p, vec4f(1.0));
    }
    let steps = ((at.b * params.nheads + h) * params.nchunks + at.c) * params.chunk_size;
    let a = load_a(steps + i);
    let b = load_a(steps + j);
    let step = load_dt(steps + j);
    sum += mat4x4f(U[0] * exp(min(a.x - b, vec4f())) * step, U[1] * exp(min(a.y - b, vec4f())) * step,
      U[2] * exp(min(a.z - b, vec4f())) * step, U[3] * exp(min(a.w - b, vec4f())) * step);
  }
  for (var r = 0u; r < 4u; r++) {
    let columns = select(0u, i0 + r + 1u, i0 + r < at.length); // none past the end
    store(at, i0 + r, j0, select(vec4f(), sum[r], below(j0, columns)));
  }
}
