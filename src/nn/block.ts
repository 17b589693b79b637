import { recompute } from "../autograd/recompute.ts";
import { rms_norm } from "../ops/rms_norm.ts";
import type { Device } from "../tensor/device.ts";
import { scope } from "../tensor/scope.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { Attention, type KVCache, type KVScales } from "./attention.ts";
import type { ForwardContext, Routing } from "./context.ts";
import { Mamba2, type Mamba2Cache } from "./mamba2.ts";
import { MLP } from "./mlp.ts";
import type { MoE } from "./moe.ts";
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
    if (!context.recompute) return this.#run(x, context, cache);
    let routing: Routing[] = [];
    let overflow: Tensor[] = [];
    const kept = context.seq_idx ? [x, context.seq_idx] : [x];
    const [y] = recompute(kept, (choices) => {
      routing = [];
      overflow = [];
      // The second run chooses the experts of the first, and takes nothing from what others replay.
      const replay = choices ? new RouterReplay(choices) : context.replay ?? null;
      const result = this.#run(x, { ...context, routing, overflow, replay }, cache);
      if (choices) replay?.dispose();
      const made = routing.flatMap(({ logits, weight, index }) => [logits, weight, index]);
      return [result, ...made, ...overflow];
    });
    // Those of the first run; the second one has lists of its own.
    context.routing?.push(...routing);
    context.overflow?.push(...overflow);
    return y!;
  }

  #run(x: Tensor, context: ForwardContext, cache: LayerCache): Tensor {
    const { mixer } = this;
    return scope(() => {
      const normed = rms_norm(x, this.norm, this.eps);
      if (mixer instanceof Mamba2) return mixer.forward(normed, context, cache as Mamba2Cache | null, x);
      if (mixer instanceof Attention) return mixer.forward(normed, context, cache as KVCache | null, x);
      return mixer instanceof MLP ? mixer.forward(normed, x) : mixer.forward(normed, context, x);
    });
  }
}
