// What a router makes of a logit, in f32. The importing file declares `override SCORE: u32`:
//
//   0 sigmoid(x)   1 exp(x - top), softmax before its division   2 x itself   3 sqrt(softplus(x))
//
// `top` is the largest logit of the token; only softmax reads it.
import package::lib::activations::sigmoid;
import package::lib::activations::softplus;

const SCORE_SOFTMAX: u32 = 1;
const SCORE_LOGITS: u32 = 2;
const SCORE_SQRTSOFTPLUS: u32 = 3;

fn router_score(x: f32, top: f32) -> f32 {
  if (SCORE == SCORE_SOFTMAX) {
    return exp(x - top);
  }
  if (SCORE == SCORE_LOGITS) {
    return x;
  }
  if (SCORE == SCORE_SQRTSOFTPLUS) {
    // Far below zero softplus(x) is exp(x), whose root still is a normal number when exp(x) no longer is.
    return select(sqrt(softplus(x)), exp(0.5 * min(x, 0.0)), x < -15.0);
  }
  return sigmoid(x);
}

// d score / dx, for a score other than softmax whole: of exp(x - top) it is that itself.
fn router_score_slope(x: f32, score: f32) -> f32 {
  if (SCORE == SCORE_SOFTMAX) {
    return score;
  }
  if (SCORE == SCORE_LOGITS) {
    return 1.0;
  }
  if (SCORE == SCORE_SQRTSOFTPLUS) {
    return select(0.5 * sigmoid(x) / max(score, 1e-30), 0.5 * score, x < -15.0);
  }
  // s * (1 - s) as a product of two sigmoids: 1 - s would lose all its digits for a large logit.
  return sigmoid(x) * sigmoid(-x);
}
