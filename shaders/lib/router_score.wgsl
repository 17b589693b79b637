// What a router makes of a logit, in f32, by the number of the score:
//
//   0 sigmoid(x)   1 exp(x - top), softmax before its division   2 x itself   3 sqrt(softplus(x))
//
// `top` is the largest logit that counts; only softmax reads it.
import package::lib::activations::sigmoid;
import package::lib::activations::softplus;

const SCORE_SOFTMAX: u32 = 1;
const SCORE_LOGITS: u32 = 2;
const SCORE_SQRTSOFTPLUS: u32 = 3;

fn router_score(score: u32, x: f32, top: f32) -> f32 {
  if (score == SCORE_SOFTMAX) {
    return exp(x - top);
  }
  if (score == SCORE_LOGITS) {
    return x;
  }
  if (score == SCORE_SQRTSOFTPLUS) {
    // Far below zero softplus(x) is exp(x), whose root still is a normal number when exp(x) no longer is.
    return select(sqrt(softplus(x)), exp(0.5 * min(x, 0.0)), x < -15.0);
  }
  return sigmoid(x);
}

// ds/dx where s = router_score(x), with `top` held.
fn router_score_slope(score: u32, x: f32, s: f32) -> f32 {
  if (score == SCORE_SOFTMAX) {
    return s;
  }
  if (score == SCORE_LOGITS) {
    return 1.0;
  }
  if (score == SCORE_SQRTSOFTPLUS) {
    return select(0.5 * sigmoid(x) / max(s, 1e-30), 0.5 * s, x < -15.0);
  }
  // s * (1 - s) as a product of two sigmoids: 1 - s would lose all its digits for a large logit.
  return sigmoid(x) * sigmoid(-x);
}
