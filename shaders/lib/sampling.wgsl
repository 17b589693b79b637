// What the sampling kernels agree on: settings, the cut that the filters left, and the weight of a token.
//
//   settings [4]: temperature, top_k (0 = off), top_p (1 = off), min_p (0 = off)
//   cut (vec4u, one per row): bits of the largest logit; key and index of the last token kept; 0
// All filters keep a prefix of the tokens in order of falling logit, rising index on ties, so one token says
// where it ends.

// Below this temperature the choice is the arg-max: dividing by it would overflow long before it changed the
// choice.
const GREEDY_BELOW: f32 = 1e-5;

fn is_kept(key: u32, index: u32, cut: vec4u) -> bool {
  return key > cut.y || (key == cut.y && index <= cut.z);
}

// exp((logit - largest) / temperature): the probability up to a factor, 1 for the largest logit.
fn token_weight(logit: f32, cut: vec4u, temperature: f32) -> f32 {
  return exp((logit - bitcast<f32>(cut.x)) / max(temperature, GREEDY_BELOW));
}
