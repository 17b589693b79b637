// Sinkhorn balancing: b_te = d0_t c_te d1_e whose rows sum to 1 / T and whose columns sum to 1 / E, where
// c_te = exp(logits_te - largest of the token).
//
//   logits, balanced [T, E]; d0 [T] and d1 [E] are scratch. One workgroup, for the two factors follow each
//   other:
//     d0_t = 1 / (T (sum_e d1_e c_te + 1e-8)), d1_e = 1 / (E (sum_t d0_t c_te + 1e-8))
//   until d1 moves by 1e-4 or less in the mean.
// Source: "BASE layers" (arXiv 2103.16716) section 2; "Unified scaling laws for routed language models"
// (arXiv 2202.01169) appendix B.
import package::lib::reduce::workgroup_sum;

override WG: u32 = 64;

struct Params {
  tokens: u32,
  experts: u32,
  rounds: u32,
}

@group(0) @binding(0) var<storage, read> logits: array<f32>;
@group(0) @binding(1) var<storage, read_write> balanced: array<f32>;
@group(0) @binding(2) var<storage, read_write> d0: array<f32>;
@group(0) @binding(3) var<storage, read_write> d1: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

var<workgroup> moved: f32;

@compute @workgroup_size(WG)
fn sinkhorn(@builtin(local_invocation_index) lane: u32) {
  let T = params.tokens;
  let E = params.experts;
  for (var t = lane; t < T; t += WG) {
    var top = logits[t * E];
    for (var e = 1u; e < E; e++) {
      top = max(top, logits[t * E + e]);
    }
    for (var e = 0u; e < E; e++) {
      balanced[t * E + e] = exp(logits[t * E + e] - top);
    }
  }
  for (var e = lane; e < E; e += WG) {
    d1[e] = 1.0;
  }
  storageBarrier();
  for (var round = 0u; round < params.rounds; round++) {
    for (var t = lane; t < T; t += WG) {
      var sum = 1e-8;
      for (var e = 0u; e < E; e++) {
        sum += d1[e] * balanced[t * E + e];
      }
      d0[t] = 1.0 / (f32(T) * sum);
    }
    storageBarrier();
    var change = 0.0;
    for (var e = lane; e < E; e += WG) {
      var sum = 1e-8;
      for (var t = 0u; t < T; t++) {
        sum += d0[t] * balanced[t * E + e];
      }
      let next = 1.0 / (f32(E) * sum);
      change += abs(next - d1[e]);
      d1[e] = next;
    }
    let all = workgroup_sum(change, lane);
    if (lane == 0u) {
      moved = all / f32(E);
    }
    storageBarrier();
    if (workgroupUniformLoad(&moved) <= 1e-4) {
      break;
    }
  }
  for (var t = lane; t < T; t += WG) {
    for (var e = 0u; e < E; e++) {
      balanced[t * E + e] *= d0[t] * d1[e];
    }
  }
}
