// Weights of the chosen experts of a token: s / (sum over the chosen + 1e-20) * scaling where
// `params.normalise`, otherwise s * scaling; softmax is over all experts then.
//
// The importing file declares `override SCORE`, `logits`, `topk_idx`, and `params` with experts, topk,
// normalise and scaling.
import package::lib::router_score::router_score;

// The expert of a choice; what the table holds never leads out of the logits of its token.
fn chosen_expert(choice: u32) -> u32 {
  return min(topk_idx[choice], params.experts - 1u);
}

// The largest logit that softmax is relative to, so that no exp overflows and one of them is 1: of the chosen
// ones where only they count.
fn top_logit(row: u32, choices: u32) -> f32 {
  var top = -3.4e38;
  if (SCORE == 1u) {
    if (params.normalise != 0u) {
      for (var k = 0u; k < params.topk; k++) {
        top = max(top, logits[row + chosen_expert(choices + k)]);
      }
    } else {
      for (var e = 0u; e < params.experts; e++) {
        top = max(top, logits[row + e]);
      }
    }
  }
  return top;
}

// What scores are divided by; 1 where they are taken as they are.
fn score_divisor(row: u32, choices: u32, top: f32) -> f32 {
  var sum = 0.0;
  if (params.normalise != 0u) {
    for (var k = 0u; k < params.topk; k++) {
      sum += router_score(SCORE, logits[row + chosen_expert(choices + k)], top);
    }
    return sum + 1e-20;
  }
  if (SCORE == 1u) {
    for (var e = 0u; e < params.experts; e++) {
      sum += router_score(SCORE, logits[row + e], top);
    }
    return sum;
  }
  return 1.0;
}
