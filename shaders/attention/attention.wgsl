// Attention, forward: out = softmax(scale q k^T) v, lse = log(sum(exp(scale q k^T))).
//
//   q, out [B, L, Hq, Dh] · k, v [B, Lk, Hkv, Dh] · lse [B, Hq, L] · seq_idx i32 [B, L] (condition `seq_idx`)
//
// Query t sees the keys 0 .. t + reach (of its own seq_idx): reach = Lk - L is causal attention, reach = Lk
// shows every key. Query head h reads key/value head h / (Hq / Hkv). HEAD_VEC4 = Dh / 4 is at most 16. All
// arithmetic in f32.
//
// One invocation owns four (or two) neighbouring query rows of a head and walks over the keys; one workgroup
// owns WG * OWNED rows and stops at the last key that any of them sees. Rows and results stay in registers
// (lib/slab) and no workgroup memory is used: made for adapters where loads and barriers are dear. Where
// subgroups exist a quad shares its loads.
//
// Online softmax (Milakov & Gimelshein 2018; Dao 2023, arXiv 2307.08691, algorithm 1). Masked scores are the
// finite -1e30 and their weights are set to zero after exp, so no infinity arises.
import package::lib::index::workgroup_index;
import package::lib::slab::{OWNED, Row, Rows, RowsU, Part, Slab};
import package::lib::slab::{row_numbers, part_dot, slab_add, slab_scale, set_row, get_row};
@if(seq_idx) import package::lib::slab::RowsI;
@if(subgroups) import package::lib::slab::gather_part;

@group(0) @binding(0) var<storage, read> q: array<vec4f>;
@group(0) @binding(1) var<storage, read> k: array<vec4f>;
@group(0) @binding(2) var<storage, read> v: array<vec4f>;
@group(0) @binding(3) var<storage, read_write> out: array<vec4f>;
@group(0) @binding(4) var<storage, read_write> lse: array<f32>;
@if(seq_idx) @group(0) @binding(5) var<storage, read> seq_idx: array<i32>;

struct Params {
  batch: u32,
  seqlen: u32,
  kv_seqlen: u32,
  nheads: u32,
  nkv_heads: u32,
  reach: u32, // query t sees the keys 0 .. t + reach
  scale: f32,
}
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 8;
override HEAD_VEC4: u32 = 8;

const HIDDEN: f32 = -1e30;

fn key(at: u32, d: u32) -> vec4f {
  if (d >= HEAD_VEC4) { return vec4f(); }
  return k[at + d];
}

fn key_part(at: u32, d: u32, quad: u32) -> Part {
  @if(subgroups) return gather_part(key(at, d + quad));
  @else return Part(key(at, d), key(at, d + 1u), key(at, d + 2u), key(at, d + 3u));
}

fn value(at: u32, d: u32) -> vec4f {
  if (d >= HEAD_VEC4) { return vec4f(); }
  return v[at + d];
}

fn value_part(at: u32, d: u32, quad: u32) -> Part {
  @if(subgroups) return gather_part(value(at, d + quad));
  @else return Part(value(at, d), value(at, d + 1u), value(at, d + 2u), value(at, d + 3u));
}

fn attend(tile: u32, lane: u32, quad: u32) {
  let rows = WG * OWNED;
  let ntiles = (params.seqlen + rows - 1u) / rows;
  let h = (tile / ntiles) % params.nheads;
  let b = tile / (ntiles * params.nheads);
  if (b >= params.batch) { return; }
  let first = (tile % ntiles) * rows;
  let mine = first + lane * OWNED;
  let kv_head = b * params.kv_seqlen * params.nkv_heads + h / (params.nheads / params.nkv_heads);
  let position = row_numbers(mine + params.reach);

  var row: Row;
  var q0 = Slab();
  var q1 = Slab();
  var q2 = Slab();
  var q3 = Slab();
  @if(seq_idx) var documents = RowsI();
  for (var t = mine; t < min(mine + OWNED, params.seqlen); t++) {
    let r = t - mine;
    let at = ((b * params.seqlen + t) * params.nheads + h) * HEAD_VEC4;
    for (var i = at; i < at + HEAD_VEC4; i++) { row[i - at] = params.scale * q[i]; }
    set_row(&q0, r, &row, 0u);
    if (HEAD_VEC4 > 4u) { set_row(&q1, r, &row, 4u); }
    if (HEAD_VEC4 > 8u) { set_row(&q2, r, &row, 8u); }
    if (HEAD_VEC4 > 12u) { set_row(&q3, r, &row, 12u); }
    @if(seq_idx) documents[r] = seq_idx[b * params.seqlen + t];
  }

  var o0 = Slab();
  var o1 = Slab();
  var o2 = Slab();
  var o3 = Slab();
  var top = Rows(HIDDEN);
  var total = Rows();
  let end = min(min(first + rows, params.seqlen) + params.reach, params.kv_seqlen);
  for (var j = 0u; j < end; j++) {
    let at = (kv_head + j * params.nkv_heads) * HEAD_VEC4;
    var s = part_dot(key_part(at, 0u, quad), q0);
    if (HEAD_VEC4 > 4u) { s += part_dot(key_part(at, 4u, quad), q1); }
    if (HEAD_VEC4 > 8u) { s += part_dot(key_part(at, 8u, quad), q2); }
    if (HEAD_VEC4 > 12u) { s += part_dot(key_part(at, 12u, quad), q3); }

    var seen = position >= RowsU(j);
    @if(seq_idx) seen &= documents == RowsI(seq_idx[b * params.seqlen + j]);
    s = select(Rows(HIDDEN), s, seen);
    let new_top = max(top, s);
    let decay = exp(top - new_top);
    top = new_top;
    let p = select(Rows(), exp(s - top), seen);
    total = total * decay + p;
    o0 = slab_add(slab_scale(o0, decay), value_part(at, 0u, quad), p);
    if (HEAD_VEC4 > 4u) { o1 = slab_add(slab_scale(o1, decay), value_part(at, 4u, quad), p); }
    if (HEAD_VEC4 > 8u) { o2 = slab_add(slab_scale(o2, decay), value_part(at, 8u, quad), p); }
    if (HEAD_VEC4 > 12u) { o3 = slab_add(slab_scale(o3, decay), value_part(at, 12u, quad), p); }
  }

  total = max(total, Rows(1e-30)); // a row that sees nothing gives zeros
  let inverse = 1.0 / total;
  let kept = top + log(total);
  o0 = slab_scale(o0, inverse);
  o1 = slab_scale(o1, inverse);
  o2 = slab_scale(o2, inverse);
  o3 = slab_scale(o3, inverse);
  for (var t = mine; t < min(mine + OWNED, params.seqlen); t++) {
    let r = t - mine;
    let at = ((b * params.seqlen + t) * params.nheads + h) * HEAD_VEC4;
    get_row(o0, r, &row, 0u);
    if (HEAD_VEC4 > 4u) { get_row(o1, r, &row, 4u); }
    if (HEAD_VEC4 > 8u) { get_row(o2, r, &row, 8u); }
    if (HEAD_VEC4 > 12u) { get_row(o3, r, &row, 12u); }
    for (var i = at; i < at + HEAD_VEC4; i++) { out[i] = row[i - at]; }
    lse[(b * params.nheads + h) * params.seqlen + t] = kept[r];
  }
}

@if(subgroups)
@compute @workgroup_size(WG)
fn attention(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32, @builtin(subgroup_invocation_id) subgroup_lane: u32,
) {
  attend(workgroup_index(wid, nwg), lane, subgroup_lane % 4u);
}
@else
@compute @workgroup_size(WG)
fn attention(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  attend(workgroup_index(wid, nwg), lane, 0u);
}
