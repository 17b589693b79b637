// Causal attention, backward to keys and values. With p = exp(scale q k^T - lse) and ds = p * (dout v^T - delta):
//
//   dv = sum over queries of p dout, dk = scale * sum over queries of ds q, both over all query heads of the group
//   q, dout [B, L, Hq, Dh] · k, v, dk, dv [B, Lk, Hkv, Dh] · stats = (lse, delta) [B, Hq, L, 2] · seq_idx i32 [B, L]
//
// Positions, heads and documents are those of attention.wgsl. One invocation owns four key rows of a key/value head and
// walks over the heads of the group, then over the queries that may see them, in steps of four (shared by a quad of
// lanes where subgroups exist); one workgroup owns 4 WG neighbouring keys. The order of the sums is fixed and nothing
// is added atomically. HEAD_VEC4 = Dh / 4 is at most 16. All arithmetic in f32.
import package::lib::index::workgroup_index;
import package::lib::slab::{Slab, Place, next_four, slab_dot, slab_add, slab_scale};
@if(subgroups) import package::lib::slab::spread;

@group(0) @binding(0) var<storage, read> q: array<vec4f>;
@group(0) @binding(1) var<storage, read> k: array<vec4f>;
@group(0) @binding(2) var<storage, read> v: array<vec4f>;
@group(0) @binding(3) var<storage, read> dout: array<vec4f>;
@group(0) @binding(4) var<storage, read> stats: array<vec2f>;
@group(0) @binding(5) var<storage, read_write> dk: array<vec4f>;
@group(0) @binding(6) var<storage, read_write> dv: array<vec4f>;
@if(seq_idx) @group(0) @binding(7) var<storage, read> seq_idx: array<i32>;

struct Params {
  batch: u32,
  seqlen: u32,
  kv_seqlen: u32,
  nheads: u32,
  nkv_heads: u32,
  scale: f32,
}
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 8;
override HEAD_VEC4: u32 = 8;

fn key_rows(at: vec4u, d: u32) -> mat4x4f {
  if (d >= HEAD_VEC4) { return mat4x4f(); }
  return params.scale * mat4x4f(k[at.x + d], k[at.y + d], k[at.z + d], k[at.w + d]);
}

fn key_slab(at: vec4u, d: u32) -> Slab {
  return Slab(key_rows(at, d), key_rows(at, d + 1u), key_rows(at, d + 2u), key_rows(at, d + 3u));
}

fn value_rows(at: vec4u, d: u32) -> mat4x4f {
  if (d >= HEAD_VEC4) { return mat4x4f(); }
  return mat4x4f(v[at.x + d], v[at.y + d], v[at.z + d], v[at.w + d]);
}

fn value_slab(at: vec4u, d: u32) -> Slab {
  return Slab(value_rows(at, d), value_rows(at, d + 1u), value_rows(at, d + 2u), value_rows(at, d + 3u));
}

fn query_rows(at: Place, d: u32) -> mat4x4f {
  if (d >= HEAD_VEC4) { return mat4x4f(); }
  @if(subgroups) return spread(q[at + d]);
  @else return mat4x4f(q[at.x + d], q[at.y + d], q[at.z + d], q[at.w + d]);
}

fn query_slab(at: Place, d: u32) -> Slab {
  return Slab(query_rows(at, d), query_rows(at, d + 1u), query_rows(at, d + 2u), query_rows(at, d + 3u));
}

fn dout_rows(at: Place, d: u32) -> mat4x4f {
  if (d >= HEAD_VEC4) { return mat4x4f(); }
  @if(subgroups) return spread(dout[at + d]);
  @else return mat4x4f(dout[at.x + d], dout[at.y + d], dout[at.z + d], dout[at.w + d]);
}

fn dout_slab(at: Place, d: u32) -> Slab {
  return Slab(dout_rows(at, d), dout_rows(at, d + 1u), dout_rows(at, d + 2u), dout_rows(at, d + 3u));
}

fn store(at: u32, d: u32, x: vec4f, y: vec4f) {
  if (d < HEAD_VEC4) {
    dk[at + d] = x * params.scale;
    dv[at + d] = y;
  }
}

fn store_slab(at: vec4u, live: vec4<bool>, d: u32, x: Slab, y: Slab) {
  for (var r = 0u; r < 4u; r++) {
    if (live[r]) {
      store(at[r], d, x.a[r], y.a[r]);
      store(at[r], d + 1u, x.b[r], y.b[r]);
      store(at[r], d + 2u, x.c[r], y.c[r]);
      store(at[r], d + 3u, x.d[r], y.d[r]);
    }
  }
}

// Weights of four queries for one key; the exponent is clamped because a masked score may exceed lse by any amount.
fn weights(s: vec4f, lse: vec4f, seen: vec4<bool>) -> vec4f {
  return select(vec4f(), exp(min(s - lse, vec4f(0.0))), seen);
}

@if(seq_idx)
fn documents(first: u32, at: vec4u) -> vec4i {
  return vec4i(seq_idx[first + at.x], seq_idx[first + at.y], seq_idx[first + at.z], seq_idx[first + at.w]);
}

fn attend(tile: u32, lane: u32, quad: u32) {
  let rows = WG * 4u;
  let ntiles = (params.kv_seqlen + rows - 1u) / rows;
  let hkv = (tile / ntiles) % params.nkv_heads;
  let b = tile / (ntiles * params.nkv_heads);
  if (b >= params.batch) { return; }
  let first = (tile % ntiles) * rows;
  let wanted = first + lane * 4u + vec4u(0u, 1u, 2u, 3u);
  let live = vec4u(params.kv_seqlen) > wanted;
  let key = min(wanted, vec4u(params.kv_seqlen - 1u)); // rows past the end repeat the last one and are not stored
  let at = ((b * params.kv_seqlen + key) * params.nkv_heads + hkv) * HEAD_VEC4;
  let shift = params.kv_seqlen - params.seqlen;
  let last = params.seqlen - 1u;
  @if(seq_idx) let document = documents(b * params.seqlen, key);

  let k0 = key_slab(at, 0u);
  let k1 = key_slab(at, 4u);
  let k2 = key_slab(at, 8u);
  let k3 = key_slab(at, 12u);
  let v0 = value_slab(at, 0u);
  let v1 = value_slab(at, 4u);
  let v2 = value_slab(at, 8u);
  let v3 = value_slab(at, 12u);
  var x0 = Slab();
  var x1 = Slab();
  var x2 = Slab();
  var x3 = Slab();
  var y0 = Slab();
  var y1 = Slab();
  var y2 = Slab();
  var y3 = Slab();
  let start = max(first, shift) - shift; // the first query that sees the first key
  let group = params.nheads / params.nkv_heads;
  for (var h = hkv * group; h < (hkv + 1u) * group; h++) {
    for (var i = start; i < params.seqlen; i += 4u) {
      let place = ((b * params.seqlen + min(next_four(i, quad), Place(last))) * params.nheads + h) * HEAD_VEC4;
      let q0 = query_slab(place, 0u);
      let q1 = query_slab(place, 4u);
      let q2 = query_slab(place, 8u);
      let q3 = query_slab(place, 12u);
      let g0 = dout_slab(place, 0u);
      let g1 = dout_slab(place, 4u);
      let g2 = dout_slab(place, 8u);
      let g3 = dout_slab(place, 12u);
      var s = slab_dot(q0, k0);
      var dp = slab_dot(g0, v0);
      if (HEAD_VEC4 > 4u) {
        s += slab_dot(q1, k1);
        dp += slab_dot(g1, v1);
      }
      if (HEAD_VEC4 > 8u) {
        s += slab_dot(q2, k2);
        dp += slab_dot(g2, v2);
      }
      if (HEAD_VEC4 > 12u) {
        s += slab_dot(q3, k3);
        dp += slab_dot(g3, v3);
      }

      let t = i + vec4u(0u, 1u, 2u, 3u);
      let row = (b * params.nheads + h) * params.seqlen + min(t, vec4u(last));
      let stat0 = stats[row.x];
      let stat1 = stats[row.y];
      let stat2 = stats[row.z];
      let stat3 = stats[row.w];
      let lse = vec4f(stat0.x, stat1.x, stat2.x, stat3.x);
      let delta = vec4f(stat0.y, stat1.y, stat2.y, stat3.y);
      let inside = vec4u(params.seqlen) > t;
      var seen0 = inside & (t + shift >= vec4u(key.x));
      var seen1 = inside & (t + shift >= vec4u(key.y));
      var seen2 = inside & (t + shift >= vec4u(key.z));
      var seen3 = inside & (t + shift >= vec4u(key.w));
      @if(seq_idx) {
        let others = documents(b * params.seqlen, min(t, vec4u(last)));
        seen0 &= others == vec4i(document.x);
        seen1 &= others == vec4i(document.y);
        seen2 &= others == vec4i(document.z);
        seen3 &= others == vec4i(document.w);
      }
      let p = mat4x4f(weights(s[0], lse, seen0), weights(s[1], lse, seen1),
        weights(s[2], lse, seen2), weights(s[3], lse, seen3));
      let ds = mat4x4f(p[0] * (dp[0] - delta), p[1] * (dp[1] - delta), p[2] * (dp[2] - delta), p[3] * (dp[3] - delta));
      x0 = slab_add(x0, q0, ds);
      y0 = slab_add(y0, g0, p);
      if (HEAD_VEC4 > 4u) {
        x1 = slab_add(x1, q1, ds);
        y1 = slab_add(y1, g1, p);
      }
      if (HEAD_VEC4 > 8u) {
        x2 = slab_add(x2, q2, ds);
        y2 = slab_add(y2, g2, p);
      }
      if (HEAD_VEC4 > 12u) {
        x3 = slab_add(x3, q3, ds);
        y3 = slab_add(y3, g3, p);
      }
    }
  }

  store_slab(at, live, 0u, x0, y0);
  if (HEAD_VEC4 > 4u) { store_slab(at, live, 4u, x1, y1); }
  if (HEAD_VEC4 > 8u) { store_slab(at, live, 8u, x2, y2); }
  if (HEAD_VEC4 > 12u) { store_slab(at, live, 12u, x3, y3); }
}

@if(subgroups)
@compute @workgroup_size(WG)
fn attention_dkv(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32, @builtin(subgroup_invocation_id) subgroup_lane: u32,
) {
  attend(workgroup_index(wid, nwg), lane, subgroup_lane % 4u);
}
@else
@compute @workgroup_size(WG)
fn attention_dkv(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u, @builtin(local_invocation_index) lane: u32,
) {
  attend(workgroup_index(wid, nwg), lane, 0u);
}
