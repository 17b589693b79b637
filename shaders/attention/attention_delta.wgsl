// Attention, backward, first step: what the softmax of each query row needs, packed as one vec2.
//
//   stats[b, h, t] = (lse, delta), delta = dot(dout, out)
//   out, dout [B, L, H, Dh] · lse [B, H, L] · stats [B, H, L, 2]. HEAD_VEC4 = Dh / 4. One invocation makes
//   one entry.
import package::lib::index::workgroup_index;

@group(0) @binding(0) var<storage, read> out: array<vec4f>;
@group(0) @binding(1) var<storage, read> dout: array<vec4f>;
@group(0) @binding(2) var<storage, read> lse: array<f32>;
@group(0) @binding(3) var<storage, read_write> stats: array<vec2f>;

struct Params {
  seqlen: u32,
  nheads: u32,
  total: u32, // entries
}
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;
override HEAD_VEC4: u32 = 8;

@compute @workgroup_size(WG)
fn attention_delta(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  if (i >= params.total) { return; }
  // i counts rows as `out` stores them: (b * L + t) * H + h.
  let h = i % params.nheads;
  let t = i / params.nheads % params.seqlen;
  let b = i / (params.nheads * params.seqlen);
  var delta = 0.0;
  for (var d = 0u; d < HEAD_VEC4; d++) {
    delta += dot(out[i * HEAD_VEC4 + d], dout[i * HEAD_VEC4 + d]);
  }
  let row = (b * params.nheads + h) * params.seqlen + t;
  stats[row] = vec2f(lse[row], delta);
}
