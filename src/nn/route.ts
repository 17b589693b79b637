/** Which experts a token goes to, and with what weights. */
import { cast } from "../ops/cast.ts";
import { scatterToGroup } from "../ops/collectives.ts";
import { router, type RouterOptions, router_weights } from "../ops/router.ts";
import { random_logits, router_jitter } from "../ops/router_noise.ts";
import { sinkhorn } from "../ops/sinkhorn.ts";
import { localsOf, shardedOf } from "../tensor/sharded.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { ofMicroBatch } from "./balance.ts";
import type { ForwardContext } from "./context.ts";
import type { Division } from "./division.ts";
import type { MoERun } from "./moe_training.ts";
import { linear } from "./product.ts";

/** What a router consists of. */
export interface RouterParts {
  /** Checkpoint path of the layer, by which its random numbers differ from those of others. */
  readonly path: string;
  /** (experts, hidden) */
  readonly gate: Tensor;
  /** (experts): for the choice alone. */
  readonly correction_bias: Tensor;
  readonly options: RouterOptions;
  readonly division: Division;
}

export interface Routed {
  /** (tokens, experts) */
  readonly logits: Tensor;
  /** (tokens, topk) */
  readonly weight: Tensor;
  /** (tokens, topk) u32, ascending */
  readonly index: Tensor;
}

/** @param x (tokens, hidden) */
export function route(x: Tensor, parts: RouterParts, { moe, replay }: ForwardContext): Routed {
  const { path, gate, correction_bias, options, division } = parts;
  const logits = moe ? trainingLogits(x, gate, path, moe) : linear(x, gate, null);
  const made = replay?.next() ?? (moe?.routing === "sinkhorn" ? balanced(logits, options, division) : null);
  const [weight, index] = made
    ? [router_weights(logits, made, options), made]
    : router(logits, correction_bias, options) as [Tensor, Tensor];
  if (replay?.isRecording) replay.record(index);
  return { logits, weight, index };
}

/** The logits as a run wants them: jittered, in bf16, or random ones instead. */
function trainingLogits(x: Tensor, gate: Tensor, path: string, moe: MoERun): Tensor {
  const { jitter, router_dtype, forced_balance, counter = null, rows = null } = moe;
  const stream = streamOf(path);
  const given = jitter > 0 ? router_jitter(x, needed(counter), { stream, amount: jitter }, rows) : x;
  const logits = router_dtype === "f32"
    ? linear(given, gate, null)
    : cast(linear(cast(given, router_dtype), cast(gate, router_dtype), null), "f32");
  return forced_balance ? random_logits(logits, needed(counter), { stream: stream + 1 }, rows) : logits;
}

/** The choice by balanced scores; the bias and groups have no part in it. */
function balanced(logits: Tensor, { topk }: RouterOptions, division: Division): Tensor {
  const scores = scatterToGroup(sinkhorn(ofMicroBatch(logits, division)), division.tokens, 0);
  const bias = shardedOf(localsOf(logits).map(({ device, shape }) => device.zeros([shape[1]!])));
  const [, index] = router(scores, bias, {
    topk, n_group: 1, topk_group: 1, norm_topk_prob: false, scaling: 1, choice: "logits",
  });
  return index!;
}

function needed(counter: Tensor | null): Tensor {
  if (counter) return counter;
  throw new Error("Jitter and forced balance need a counter of random numbers, but none was given.");
}

/** An even number of its own for each layer (FNV-1a); the odd one after it is for the layer's logits. */
function streamOf(path: string): number {
  let hash = 2166136261;
  for (const letter of path) hash = Math.imul(hash ^ letter.codePointAt(0)!, 16777619);
  return (hash & ~1) >>> 0;
}
