// What the queries of attention see. Query t of a row sees the keys 0 .. n - 1 of the same row,
//
//   n = clamp(t + 1 + (t < turn ? early : reach), 0, limit),
//
// and of these the ones of its own document. Two stretches of queries (before `turn` and from there on) serve
// rows whose positions several ranks share, where a rank holds two stretches of them; else turn is 0. n never
// falls as t grows.
//
// The importing file declares `params` with seqlen, kv_seqlen, turn, early, reach, limit, q_docs and k_docs,
// the places of the first query's and the first key's document in seq_idx.

fn keys_seen(t: vec4u) -> vec4u {
  let beyond = select(vec4i(params.reach), vec4i(params.early), t < vec4u(params.turn));
  return vec4u(clamp(vec4i(t) + 1 + beyond, vec4i(), vec4i(i32(params.limit))));
}

// How many keys the queries below `end` see together.
fn keys_below(end: u32) -> u32 {
  return keys_seen(vec4u(min(end, params.seqlen) - 1u)).x;
}

// The first query that sees a key; none does from `limit` on.
fn first_to_see(key: u32) -> u32 {
  if (key >= params.limit) { return params.seqlen; }
  let t = u32(max(i32(key) - params.early, 0));
  if (t < params.turn) { return t; }
  return max(u32(max(i32(key) - params.reach, 0)), params.turn);
}

@if(seq_idx) fn query_documents(b: u32, t: vec4u) -> vec4i {
  let i = params.q_docs + b * params.seqlen + min(t, vec4u(params.seqlen - 1u));
  return vec4i(seq_idx[i.x], seq_idx[i.y], seq_idx[i.z], seq_idx[i.w]);
}

@if(seq_idx) fn key_documents(b: u32, j: vec4u) -> vec4i {
  let i = params.k_docs + b * params.kv_seqlen + min(j, vec4u(params.kv_seqlen - 1u));
  return vec4i(seq_idx[i.x], seq_idx[i.y], seq_idx[i.z], seq_idx[i.w]);
}
