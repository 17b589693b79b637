// Attention of a few new tokens over a cache: out = softmax(scale q K^T) V over positions 0 .. position + t.
//
//   q, out [B, L, Hq, Dh] · caches [B, Hkv, Lmax, Dh] · position u32 [1], index of the first new token,
//   already in the cache · HEAD_VEC4 = Dh / 4 · all arithmetic in f32
//
// Query t sees the keys up to position + t. The L * Hq / Hkv queries that read one key head are taken four at
// a time, so that what a key or value costs to load is shared. A quad owns four of them, 64 dimensions of
// their results and one part of the keys; it meets 16 keys at a time, four per lane. Scores, weights and
// results stay in registers (see lib/team): made for adapters where loads and barriers are dear.
//
// Condition `parts`: the keys are cut into parts of `length`, and out is [B, L, Hq, nparts, HEAD_VEC4 + 1]:
// what decode_merge puts together. Parts beyond the last key are left as they are. Otherwise there is one.
//
// Condition `fp8`: the caches are E4M3 codes, four to a word. What the codes of keys are multiplied with is
// in `scale`, that of values is v_scale (1 otherwise).
//
// Online softmax as in attention.wgsl: masked scores are the finite -1e30, weights are zeroed after exp.
import package::lib::index::workgroup_index;
@if(fp8) import package::lib::e4m3::four_e4m3;
import package::lib::team::{source_lane, add_rows, scale_rows, column_of, row_order};
@if(subgroups && !octo) import package::lib::team::{quad_rows, swapped, team_max, team_sum};

@group(0) @binding(0) var<storage, read> q: array<vec4f>;
@group(0) @binding(1) var<storage, read> position: array<u32>;
@if(fp8) @group(0) @binding(2) var<storage, read> key: array<u32>;
@else @group(0) @binding(2) var<storage, read> key: array<vec4f>;
@if(fp8) @group(0) @binding(3) var<storage, read> value: array<u32>;
@else @group(0) @binding(3) var<storage, read> value: array<vec4f>;
@group(0) @binding(4) var<storage, read_write> out: array<vec4f>;

struct Params {
  batch: u32,
  seqlen: u32,
  capacity: u32,
  nheads: u32,
  nkv_heads: u32,
  length: u32,
  nparts: u32,
  scale: f32,
  v_scale: f32,
  four: u32, // 4, the rows of a matrix
}
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 8;
override HEAD_VEC4: u32 = 8;

const HIDDEN: f32 = -1e30;

// Row i of those that share key head g.
struct Row { at: u32, count: u32 }
fn row_of(b: u32, g: u32, i: u32) -> Row {
  let shared_by = params.nheads / params.nkv_heads;
  let t = i / shared_by;
  let at = (b * params.seqlen + t) * params.nheads + g * shared_by + i % shared_by;
  return Row(at, min(position[0] + t + 1u, params.capacity));
}

fn four_keys(at: vec4u, d: u32) -> mat4x4f {
  return mat4x4f(key_at(at.x + d), key_at(at.y + d), key_at(at.z + d), key_at(at.w + d));
}
fn four_values(at: vec4u, d: u32) -> mat4x4f {
  return mat4x4f(value_at(at.x + d), value_at(at.y + d), value_at(at.z + d), value_at(at.w + d));
}
fn key_at(i: u32) -> vec4f {
  @if(fp8) return four_e4m3(key[i]);
  @else return key[i];
}
fn value_at(i: u32) -> vec4f {
  @if(fp8) return four_e4m3(value[i]);
  @else return value[i];
}

@if(subgroups && !octo) @compute @workgroup_size(WG)
fn decode_attention_team(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) index: u32,
) {
  let team = workgroup_index(wid, nwg) * (WG / 4u) + index / 4u;
  let lane = index % 4u;
  let slabs = (HEAD_VEC4 + 15u) / 16u;
  let nrows = params.seqlen * (params.nheads / params.nkv_heads);
  let ntiles = (nrows + 3u) / 4u;
  // Parts vary slowest: the first workgroups have work at any position.
  let slab = team % slabs;
  let first = team / slabs % ntiles * 4u;
  let g = team / (slabs * ntiles) % params.nkv_heads;
  let b = team / (slabs * ntiles * params.nkv_heads) % params.batch;
  let part = team / (slabs * ntiles * params.nkv_heads * params.batch);
  if (part >= params.nparts) { return; }
  let begin = part * params.length;
  let end = min(begin + params.length, row_of(b, g, min(first + 4u, nrows) - 1u).count);
  if (begin >= end) { return; }

  let head = (b * params.nkv_heads + g) * params.capacity;
  let query = row_of(b, g, min(first + lane, nrows - 1u)).at * HEAD_VEC4;
  let order = min(first + row_order(lane), vec4u(nrows - 1u));
  let count = vec4u(row_of(b, g, order.x).count, row_of(b, g, order.y).count, row_of(b, g, order.z).count,
    row_of(b, g, order.w).count);
  let column = slab * 16u + lane + vec4u(0u, 4u, 8u, 12u);
  let d = min(column, vec4u(HEAD_VEC4 - 1u));
  let last = vec4u(end - 1u); // read again in place of keys past the end, of which nothing is known

  var o0 = mat4x4f();
  var o1 = mat4x4f();
  var o2 = mat4x4f();
  var o3 = mat4x4f();
  var top = vec4f(HIDDEN);
  var total = vec4f();
  for (var j = begin; j < end; j += 16u) {
    let here = j + 4u * lane + vec4u(0u, 1u, 2u, 3u);
    let at = (head + min(here, last)) * HEAD_VEC4;
    var s = mat4x4f();
    for (var i = 0u; i < HEAD_VEC4; i++) {
      s = add_rows(s, quad_rows(q[query + i]), transpose(four_keys(at, i)));
    }
    let seen = array<vec4<bool>, 4>(vec4u(count.x) > here, vec4u(count.y) > here, vec4u(count.z) > here,
      vec4u(count.w) > here);
    let hidden = vec4f(HIDDEN);
    let x = params.scale * s;
    let by_key = transpose(mat4x4f(select(hidden, x[0], seen[0]), select(hidden, x[1], seen[1]),
      select(hidden, x[2], seen[2]), select(hidden, x[3], seen[3])));
    let new_top = max(top, team_max(max(max(by_key[0], by_key[1]), max(by_key[2], by_key[3]))));
    let decay = exp(top - new_top);
    let e = transpose(mat4x4f(exp(by_key[0] - new_top), exp(by_key[1] - new_top), exp(by_key[2] - new_top),
      exp(by_key[3] - new_top)));
    var p = mat4x4f(select(vec4f(), e[0], seen[0]), select(vec4f(), e[1], seen[1]),
      select(vec4f(), e[2], seen[2]), select(vec4f(), e[3], seen[3]));
    top = new_top;
    total = total * decay + vec4f(1.0) * p; // the sums of the columns
    o0 = scale_rows(o0, decay);
    if (HEAD_VEC4 > 4u) { o1 = scale_rows(o1, decay); }
    if (HEAD_VEC4 > 8u) { o2 = scale_rows(o2, decay); }
    if (HEAD_VEC4 > 12u) { o3 = scale_rows(o3, decay); }
    for (var i = 0u; i < params.four; i++) {
      let source_keys = min(j + 4u * source_lane(lane, i) + vec4u(0u, 1u, 2u, 3u), last);
      let source = (head + source_keys) * HEAD_VEC4;
      o0 = add_rows(o0, p, four_values(source, d.x));
      if (HEAD_VEC4 > 4u) { o1 = add_rows(o1, p, four_values(source, d.y)); }
      if (HEAD_VEC4 > 8u) { o2 = add_rows(o2, p, four_values(source, d.z)); }
      if (HEAD_VEC4 > 12u) { o3 = add_rows(o3, p, four_values(source, d.w)); }
      p = swapped(p, i);
    }
  }

  total = team_sum(total);
  for (var i = 0u; i < params.four; i++) {
    if (first + i >= nrows) { continue; }
    let j = (i ^ lane) & 3u;
    let row = row_of(b, g, first + i).at;
    @if(parts) let to = (row * params.nparts + part) * (HEAD_VEC4 + 1u);
    @else let to = row * HEAD_VEC4;
    @if(parts) let all = 1.0 / params.v_scale;
    @else let all = total[j] / params.v_scale;
    if (column.x < HEAD_VEC4) { out[to + column.x] = column_of(o0, i, lane) / all; }
    if (column.y < HEAD_VEC4) { out[to + column.y] = column_of(o1, i, lane) / all; }
    if (column.z < HEAD_VEC4) { out[to + column.z] = column_of(o2, i, lane) / all; }
    if (column.w < HEAD_VEC4) { out[to + column.w] = column_of(o3, i, lane) / all; }
    @if(parts) {
      if (column.x == 0u) { out[to + HEAD_VEC4] = vec4f(top[j], total[j], 0.0, 0.0); }
    }
  }
}
