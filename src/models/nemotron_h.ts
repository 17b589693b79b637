/**
 * The Nemotron-H family: embedding, a chain of residual layers that hold one mixer each, a final RMSNorm and
 * an untied head; optionally multi-token-prediction layers that share embedding and head.
 *
 *   M  Mamba-2        x + out_proj(gated_norm(ssd(conv(in_proj(norm(x))))))
 *   *  attention      grouped queries, causal, no positional encoding
 *   -  MLP            down(relu(up(x))^2)
 *   E  mixture of experts, in a latent space where the config has one
 *
 * Training, prefill and decode are the same forward.
 * Suffixes: B batch, L seqlen, D hidden, V vocabulary, T = B*L.
 */
import { Attention, type KVScales } from "../nn/attention.ts";
import { balanceLoss, type BalanceOptions, countingOf, type Weighed } from "../nn/balance.ts";
import { Block, type LayerCache, type Mixer, runBlocks } from "../nn/block.ts";
import type { ForwardContext, Routing, Step } from "../nn/context.ts";
import { type Division, sizeOfGroup, SOLO } from "../nn/division.ts";
import { Mamba2, type Mamba2Cache } from "../nn/mamba2.ts";
import { MLP } from "../nn/mlp.ts";
import { MoE } from "../nn/moe.ts";
import type { MoETraining } from "../nn/moe_training.ts";
import { MTP } from "../nn/mtp.ts";
import type { OffloadChoice } from "../nn/offload.ts";
import { type Recompute, RECOMPUTE_OFF } from "../nn/recompute.ts";
import type { RouterReplay } from "../nn/replay.ts";
import { enter, tableRows, vocabularyCrossEntropy } from "../nn/tensor_parallel.ts";
import { type Weight, Weights } from "../nn/weights.ts";
import { sumOverGroup } from "../ops/collectives.ts";
import { add, scale } from "../ops/elementwise.ts";
import { linear } from "../ops/linear.ts";
import { denseWeight } from "../ops/quantize.ts";
import { rms_norm } from "../ops/rms_norm.ts";
import { BlockTensor } from "../tensor/blocks.ts";
import type { Device } from "../tensor/device.ts";
import { UsageError } from "../tensor/errors.ts";
import { scope, unscoped } from "../tensor/scope.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { type LayerSpec, layerSpecs, mtpSpecs, type NemotronHConfig } from "./config.ts";
import { endsChain, type Part, wholePart } from "./part.ts";

/** How keys and values are kept: E4M3 codes with a scale for each layer's keys and values, or f32. */
export const KV_FORMATS = ["f32", "fp8"] as const;
export type KVFormat = (typeof KV_FORMATS)[number];

/** Caches of all layers, and how far they reach. */
export interface ModelCache {
  readonly batch: number;
  /** Most tokens that the attention layers can hold. */
  readonly capacity: number;
  readonly layers: readonly LayerCache[];
  readonly mtp: readonly LayerCache[];
  /** u32 [1]: tokens taken in so far, as the GPU sees it. */
  readonly position: Tensor;
  /** The same on the host, for prefill. */
  length: number;
}

/**
 * What a training step needs of a batch, on the device. Ranks that share a sequence by tensor parallelism all
 * have the whole of it, under sequence parallelism too: the embedding keeps a rank's own positions, layers
 * and the head enter with all of them. Under context parallelism "whole" is what a rank of `cp` holds.
 */
export interface TrainingBatch {
  /** (batch, seqlen) i32 */
  readonly input_ids: Tensor;
  /** (batch, seqlen) i32: the token after each position; -100 where it does not count */
  readonly targets: Tensor;
  /** (batch, seqlen) i32 document of each position, or null */
  readonly seq_idx: Tensor | null;
  /** u32 [4]: seed and number of the micro-batch, for random numbers in front of routers. */
  readonly counter?: Tensor;
  /** u32 [tokens]: where the tokens of a rank stand in the whole rows; null: 0, 1, 2 ... */
  readonly rows?: Tensor | null;
  /**
   * For every prediction depth d = 1, 2, ...: tokens at t+d and targets at t+d+1 (-100 beyond the document).
   */
  readonly mtp: readonly { readonly input_ids: Tensor; readonly targets: Tensor }[];
}

export interface LossOptions {
  /** Weight of the mean over prediction depths. */
  readonly mtp_scale: number;
  /** What the routers add to the loss; default: nothing. */
  readonly balance?: Omit<BalanceOptions, "sequences">;
  /** What MoE layers do other than the model says; default: nothing. */
  readonly moe?: MoETraining | null;
  /** Records the choices of routers, or replays them. */
  readonly replay?: RouterReplay | null;
  /** What the backward pass computes again instead of keeping it; default: nothing. */
  readonly recompute?: Recompute;
  /** What lies in host memory until the backward pass; default: nothing. */
  readonly offload?: OffloadChoice;
  /** Probability that targets give to all other words alike; default 0. */
  readonly label_smoothing?: number;
}

export interface Loss {
  /** What is minimised: main + mtp_scale / depths * sum(mtp) + aux. */
  readonly total: Tensor;
  readonly main: Tensor;
  readonly mtp: readonly Tensor[];
  readonly aux: Tensor | null;
  readonly routing: readonly Routing[];
}

/** Which part of a model is held, by which ranks. */
export interface Share {
  /** How its ranks divide the work; parameters are sharded tensors then, of the shapes of one rank. */
  readonly division?: Division;
  /** Default: all of it. */
  readonly part?: Part;
}

export class NemotronH {
  readonly config: NemotronHConfig;
  readonly division: Division;
  readonly part: Part;
  readonly device: Device;
  /** Dense parameters by checkpoint name; the experts of a layer are one stacked tensor. */
  readonly parameters: ReadonlyMap<string, Tensor>;
  /** Block-quantised parameters by checkpoint name. They are not trained. */
  readonly quantised: ReadonlyMap<string, BlockTensor>;
  /** Scales of keys and values in FP8 by the path of the mixer, where the checkpoint has them. */
  readonly kvScales: ReadonlyMap<string, KVScales>;
  /** Those of the part. */
  readonly blocks: readonly Block[];
  readonly mtp: MTP | null;
  readonly #embeddings: Weight | null;
  readonly #norm_f: Tensor | null;
  readonly #lm_head: Weight | null;

  /**
   * @param parameters those of the part (`parametersOf`), by checkpoint name
   * @throws ConfigError when a parameter is missing or has another shape than the config says.
   */
  constructor(
    config: NemotronHConfig, parameters: ReadonlyMap<string, Weight>,
    kvScales: ReadonlyMap<string, KVScales> = new Map(),
    { division = SOLO, part = wholePart(config) }: Share = {},
  ) {
    const { hidden_size: D, layer_norm_epsilon: eps } = config;
    const V = config.vocab_size / sizeOfGroup(division.tp);
    const weights = new Weights(parameters);
    const backbone = weights.at("backbone");
    this.config = config;
    this.division = division;
    this.part = part;
    this.kvScales = kvScales;
    const all = [...parameters];
    this.parameters = new Map(all.filter(
      (entry): entry is [string, Tensor] => !(entry[1] instanceof BlockTensor)));
    this.quantised = new Map(all.filter(
      (entry): entry is [string, BlockTensor] => entry[1] instanceof BlockTensor));
    const [first] = all;
    if (!first) throw new UsageError("A model, or a part of one, needs parameters, found none.");
    this.device = first[1].device;
    this.#embeddings =
      part.embedding || part.mtp ? backbone.takeWeight("embeddings.weight", [V, D]) : null;
    const build = (specs: readonly LayerSpec[], at: Weights, from = 0) => specs.map((spec, i) => new Block(
      D, eps, createMixer(config, spec, at.at(from + i).at("mixer"), division), at.at(from + i)));
    this.blocks = build(
      layerSpecs(config).slice(part.from, part.to), backbone.at("layers"), part.from);
    this.#norm_f = endsChain(part, config) ? backbone.take("norm_f.weight", [D]) : null;
    this.#lm_head = part.head ? weights.takeWeight("lm_head.weight", [V, D]) : null;
    const mtp = weights.at("mtp").at("layers");
    const specs = part.mtp ? mtpSpecs(config) : [];
    this.mtp = specs.length > 0 ? new MTP(D, eps, build(specs, mtp), mtp) : null;
  }

  get embeddings(): Weight {
    return this.#held(this.#embeddings, "embedding table");
  }

  get norm_f(): Tensor {
    return this.#held(this.#norm_f, "final norm");
  }

  get lm_head(): Weight {
    return this.#held(this.#lm_head, "head");
  }

  #held<T>(weight: T | null, what: string): T {
    if (weight !== null) return weight;
    const { from, to } = this.part;
    throw new UsageError(`The part of layers ${from} to ${to} of a model has no ${what}.`);
  }

  /**
   * How keys and values are kept unless something else is asked for: in FP8 where there are scales for it.
   */
  get kvFormat(): KVFormat {
    return this.kvScales.size > 0 ? "fp8" : "f32";
  }

  /**
   * Caches for an incremental run of `batch` rows with at most `capacity` tokens.
   * @param kv how keys and values are kept; in FP8 without scales in the checkpoint these are 1
   */
  createCache(batch: number, capacity: number, kv: KVFormat = this.kvFormat): ModelCache {
    const scales = kv === "fp8" ? (path: string) => this.kvScales.get(path) ?? { key: 1, value: 1 } : null;
    return unscoped(() => ({
      batch, capacity, length: 0,
      layers: this.blocks.map((block) => block.createCache(this.device, batch, capacity, scales)),
      mtp: (this.mtp?.blocks ?? []).map((block) => block.createCache(this.device, batch, capacity, scales)),
      position: this.device.zeros([1], "u32"),
    }));
  }

  /**
   * Runs embedding, layers and the final norm.
   * @param input_ids (batch, seqlen) i32
   * @param visit called with the input of every block and the output of the last
   * @returns (batch, seqlen, hidden)
   */
  hidden(
    input_ids: Tensor, context: ForwardContext = PLAIN, cache: ModelCache | null = null,
    visit: (x: Tensor, i: number) => void = () => {},
  ): Tensor {
    return this.run(this.embed(input_ids), context, cache, visit);
  }

  /** (batch, seqlen) i32 -> (batch, seqlen, hidden), a rank's own positions under sequence parallelism. */
  embed(input_ids: Tensor): Tensor {
    return tableRows(input_ids, this.embeddings, this.division);
  }

  /** The layers of this part, and the final norm after the last of all. Shapes as in `hidden`. */
  run(
    x_BLD: Tensor, context: ForwardContext = PLAIN, cache: ModelCache | null = null,
    visit: (x: Tensor, i: number) => void = () => {},
  ): Tensor {
    const x = runBlocks(this.blocks, x_BLD, context, cache && cache.layers, visit);
    visit(x, this.blocks.length);
    return this.#norm_f ? rms_norm(x, this.#norm_f, this.config.layer_norm_epsilon) : x;
  }

  /** One prediction depth: hidden states that predict the token after `next_ids`. Shapes as in `hidden`. */
  mtpHidden(
    h: Tensor, next_ids: Tensor, context: ForwardContext = PLAIN, cache: ModelCache | null = null,
  ): Tensor {
    const { mtp } = this;
    if (!mtp) throw new Error("This model has no multi-token-prediction layers.");
    // The first layers of a stage are not these.
    const { recompute } = context;
    const inside = recompute && recompute.first < Infinity
      ? { ...context, recompute: { ...recompute, layers: 0 } } : context;
    const x = mtp.input(this.embed(next_ids), h);
    return mtp.output(runBlocks(mtp.blocks, x, inside, cache && cache.mtp));
  }

  /** (..., hidden) -> (..., vocabulary), of which a rank of `division.tp` has its own rows' logits. */
  logits(h: Tensor): Tensor {
    return linear(enter(h, this.division), this.lm_head, null);
  }

  /** Mean cross entropy of the next token and of the deeper predictions. Scalars. */
  loss(batch: TrainingBatch, options: LossOptions): Loss {
    const context = trainingContext(batch, options);
    return this.lossFrom(this.hidden(batch.input_ids, context), batch, options, context);
  }

  /**
   * The same from hidden states after the final norm, which another part may have computed.
   * @param context that of the layers so far; its routing is that of this part's layers
   * @param states those of the deeper predictions, where another part has the prediction layers
   */
  lossFrom(
    h_BLD: Tensor, batch: TrainingBatch, options: LossOptions, context: ForwardContext,
    states?: readonly Tensor[],
  ): Loss {
    const routing = context.routing ?? [];
    const backbone = routing.length;
    let h = h_BLD;
    const { label_smoothing } = options;
    const main = this.crossEntropy(h, batch.targets, label_smoothing);
    const mtp = batch.mtp.map(({ input_ids, targets }, i) => {
      h = states ? states[i]! : this.mtpHidden(h, input_ids, context);
      return this.crossEntropy(h, targets, label_smoothing);
    });
    let total = main;
    for (const loss of mtp) total = add(total, scale(loss, options.mtp_scale / mtp.length));
    const share = 1 / batch.mtp.length;
    const aux = this.auxLoss(routing.map((one, i) => ({ ...one, share: i < backbone ? 1 : share })),
      batch, options);
    if (aux) total = add(total, aux);
    return { total, main, mtp, aux, routing };
  }

  /**
   * Mean cross entropy over positions with a target, a scalar; the same on all ranks of `division.tp`.
   * @param h (batch, seqlen, hidden), a rank's own positions under sequence parallelism
   * @param targets (batch, seqlen) i32, all positions
   */
  crossEntropy(h: Tensor, targets: Tensor, label_smoothing = 0): Tensor {
    const { config: { hidden_size: D }, division } = this;
    const rows = enter(h, division).reshape([-1, D]);
    return vocabularyCrossEntropy(
      rows, denseWeight(this.lm_head), targets.reshape([-1]), division, label_smoothing);
  }

  /**
   * What routers add to the loss, a scalar: over all tokens of the micro-batch, whose ranks all have the sum.
   * Null where they add nothing.
   * @param routing of layers of this part, each with its share
   */
  auxLoss(routing: readonly Weighed[], batch: TrainingBatch, { balance }: LossOptions): Tensor | null {
    const { division } = this;
    const own = balance ? balanceLoss(
      routing, { counting: countingOf(division), ...balance, sequences: batch.input_ids.shape[0]! }) : null;
    return own && sumOverGroup(own, division.tokens);
  }

  /**
   * Takes `length` tokens of the last verification pass into the recurrent states;
   * attention caches hold them already.
   */
  commit(length: number, cache: ModelCache): void {
    this.blocks.forEach(({ mixer }, i) => {
      if (mixer instanceof Mamba2) scope(() => mixer.commit(length, cache.layers[i] as Mamba2Cache));
    });
  }

  /** Frees the parameters. */
  dispose(): void {
    for (const parameter of [...this.parameters.values(), ...this.quantised.values()]) parameter.dispose();
  }
}

/** The context of a run that is trained. */
export function trainingContext(batch: TrainingBatch, options: LossOptions): ForwardContext {
  const { recompute = RECOMPUTE_OFF, moe = null, replay = null } = options;
  return {
    seq_idx: batch.seq_idx, step: null, routing: [], recompute, replay,
    moe: moe && { ...moe, counter: batch.counter, rows: batch.rows ?? null },
  };
}

const PLAIN: ForwardContext = { seq_idx: null, step: null, routing: null };

/** The context of an incremental call that continues from `cache`. */
export function stepContext(cache: ModelCache, options: Omit<Step, "position" | "length">): ForwardContext {
  return {
    seq_idx: null, routing: null, step: { position: cache.position, length: cache.length, ...options },
  };
}

/** Frees what a cache holds. */
export function disposeCache(cache: ModelCache): void {
  for (const layer of [...cache.layers, ...cache.mtp]) {
    if (layer?.kind === "mamba2") for (const state of [layer.conv_state, layer.ssm_state]) state.dispose();
    if (layer?.kind === "kv") for (const state of [layer.key, layer.value]) state.dispose();
  }
  cache.position.dispose();
}

/** A mixer with the sizes of one rank. */
function createMixer(config: NemotronHConfig, spec: LayerSpec, w: Weights, division: Division): Mixer {
  const { hidden_size: hidden } = config;
  const tp = sizeOfGroup(division.tp);
  switch (spec.kind) {
    case "mamba":
      return new Mamba2({
        hidden, nheads: config.mamba_num_heads / tp, headdim: config.mamba_head_dim,
        dstate: config.ssm_state_size, ngroups: config.n_groups / tp, conv_kernel: config.conv_kernel,
        chunk_size: config.chunk_size, dt_limit: spec.dt_limit, eps: config.layer_norm_epsilon,
        conv_bias: config.use_conv_bias, proj_bias: config.use_bias,
      }, w, division);
    case "attention":
      return new Attention({
        hidden, num_attention_heads: config.num_attention_heads / tp,
        num_key_value_heads: Math.max(1, config.num_key_value_heads / tp), head_dim: config.head_dim,
        bias: config.attention_bias,
      }, w, division);
    case "mlp":
      return new MLP(hidden, spec.intermediate_size / tp, config.mlp_bias, w, division);
    case "moe":
      return new MoE({
        hidden, ...spec, shared_size: spec.shared_size / tp, shared_gate: config.shared_expert_gate,
        bias: config.mlp_bias,
        moe_intermediate_size: spec.moe_intermediate_size / sizeOfGroup(division.etp),
        n_group: config.n_group, topk_group: config.topk_group, group_best: config.group_best,
        scoring_func: config.scoring_func, router_choice: config.router_choice,
        norm_topk_prob: config.norm_topk_prob, routed_scaling_factor: config.routed_scaling_factor,
      }, w, division);
  }
}
