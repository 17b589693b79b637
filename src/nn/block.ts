import { recompute } from "../autograd/recompute.ts";
import { rms_norm } from "../ops/rms_norm.ts";
import type { Device } from "../tensor/device.ts";
import { promote, scope } from "../tensor/scope.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { Attention, type KVCache, type KVScales } from "./attention.ts";
import { type ForwardContext, type Overflow, recomputes, type Routing } from "./context.ts";
import { Mamba2, type Mamba2Cache } from "./mamba2.ts";
import type { MLP } from "./mlp.ts";
import { MoE } from "./moe.ts";
import { offloaded, type OffloadedModule } from "./offload.ts";
import { RECOMPUTE_OFF } from "./recompute.ts";
import { RouterReplay } from "./replay.ts";
import type { Weights } from "./weights.ts";

/** What one layer carries from token to token; null for layers without memory. */
export type LayerCache = Mamba2Cache | KVCache | null;

export type Mixer = Mamba2 | Attention | MLP | MoE;

/** One residual layer with a single mixer: x + mixer(RMSNorm(x)). */
export class Block {
  readonly norm: Tensor;
  readonly mixer: Mixer;
  readonly eps: number;

  constructor(hidden: number, eps: number, mixer: Mixer, w: Weights) {
    this.norm = w.take("norm.weight", [hidden]);
    this.mixer = mixer;
    this.eps = eps;
  }

  /** @param scales of keys and values in FP8 by the mixer's path; null: f32 */
  createCache(
    device: Device, batch: number, capacity: number, scales: ((path: string) => KVScales) | null = null,
  ): LayerCache {
    const { mixer } = this;
    if (mixer instanceof Mamba2) return mixer.createCache(device, batch);
    if (mixer instanceof Attention) {
      return mixer.createCache(device, batch, capacity, scales && scales(mixer.path));
    }
    return null;
  }

  /** (batch, seqlen, hidden) -> (batch, seqlen, hidden) */
  forward(x: Tensor, context: ForwardContext, cache: LayerCache): Tensor {
    const { mixer } = this;
    const { offload } = context;
    offload?.pass.next();
    return scope(() => {
      const normed = offloaded(offload, "layernorm", () => this.#normed(x, context));
      return offloaded(offload, kindOf(mixer), () => this.#mixed(normed, x, context, cache));
    });
  }

  #mixed(normed: Tensor, x: Tensor, context: ForwardContext, cache: LayerCache): Tensor {
    const { mixer } = this;
    if (mixer instanceof Mamba2) return mixer.forward(normed, context, cache as Mamba2Cache | null, x);
    if (mixer instanceof Attention) return mixer.forward(normed, context, cache as KVCache | null, x);
    const module = mixer instanceof MoE ? "moe" : "mlp";
    const run = ([u, v]: readonly Tensor[], inside: ForwardContext) =>
      mixer instanceof MoE ? mixer.forward(u!, inside, v) : mixer.forward(u!, v);
    if (!recomputes(context, module)) return run([normed, x], context);
    const [routing, overflow]: [Routing[], Overflow[] | null] = [[], context.overflow ? [] : null];
    const y = recomputed([normed, x], { ...context, routing, overflow }, run);
    context.routing?.push(...promote(routing));
    context.overflow?.push(...promote(overflow ?? []));
    return y;
  }

  #normed(x: Tensor, context: ForwardContext): Tensor {
    const norm = ([u]: readonly Tensor[]) => rms_norm(u!, this.norm, this.eps);
    if (!recomputes(context, "layernorm")) return norm([x]);
    return recompute([x], (_, inputs) => [norm(inputs)], { discard: true })[0]!;
  }
}

function kindOf(mixer: Mixer): OffloadedModule {
  if (mixer instanceof Mamba2) return "mamba";
  if (mixer instanceof Attention) return "attention";
  return mixer instanceof MoE ? "moe" : "mlp";
}

/**
 * Runs layers one after the other.
 * @param caches of every layer; none: null
 * @param visit called with the input of every layer
 */
export function runBlocks(
  blocks: readonly Block[], x: Tensor, context: ForwardContext, caches: readonly LayerCache[] | null = null,
  visit: (x: Tensor, i: number) => void = () => {},
): Tensor {
  const { layers, first } = context.recompute ?? RECOMPUTE_OFF;
  let y = x;
  for (let from = 0; from < blocks.length;) {
    const to = from < first && layers > 0 ? Math.min(from + layers, blocks.length) : from + 1;
    const begin = from;
    const run = ([u]: readonly Tensor[], inside: ForwardContext) =>
      blocks.slice(begin, to).reduce((v, block, i) => {
        visit(v, begin + i);
        return block.forward(v, inside, caches && caches[begin + i]!);
      }, u!);
    y = from < first && layers > 0 ? recomputedLayers(y, context, run) : run([y], context);
    from = to;
  }
  return y;
}

/** Whole layers: what is kept of them is the input of the first norm. */
function recomputedLayers(
  x: Tensor, context: ForwardContext,
  body: (inputs: readonly Tensor[], context: ForwardContext) => Tensor,
): Tensor {
  const { offload } = context;
  offload?.pass.next();
  return offloaded(offload, "layernorm", () => recomputed([x], { ...context, offload: null }, body));
}

/** Runs what may hold MoE layers now, and a second time in the backward pass. */
function recomputed(
  inputs: readonly Tensor[], context: ForwardContext,
  body: (inputs: readonly Tensor[], context: ForwardContext) => Tensor,
): Tensor {
  let routing: Routing[] = [];
  let overflow: Overflow[] = [];
  const kept = context.seq_idx ? [...inputs, context.seq_idx] : inputs;
  const [y] = recompute(kept, (choices, same) => {
    routing = [];
    overflow = [];
    // The second run chooses the experts of the first, and takes nothing from what others replay.
    const made = choices && choices.length > 0 ? new RouterReplay(choices) : null;
    const result = body(same, {
      ...context, routing, overflow: context.overflow ? overflow : null,
      replay: made ?? context.replay ?? null,
    });
    made?.dispose();
    return [
      result, ...routing.flatMap(({ logits, weight, index }) => [logits, weight, index]),
      ...overflow.map(({ missing }) => missing),
    ];
  });
  // Those of the first run; the second one has lists of its own.
  context.routing?.push(...routing);
  context.overflow?.push(...overflow);
  return y!;
}
