/**
 * Predicted bytes that the ranks of a layout send in a training step, by collective: a formula, not
 * a measurement. Tokens are spread evenly over the experts, and rows count that are sent, not the room for
 * them; numbers of documents, what balancing losses count, and scalars are left out. Spec: Megatron Core's
 * mappings, dispatchers and pipeline messages.
 */
import { layerSpecs, mtpSpecs } from "../models/config.ts";
import type { LayerSpec, NemotronHConfig } from "../models/config.ts";
import { neighboursOf } from "../nn/division.ts";
import type { MoETraining } from "../nn/moe_training.ts";
import { bytesSent } from "../ops/collectives.ts";
import type { CollectiveKind } from "../ops/collectives.ts";
import { holdingsOf } from "./holdings.ts";
import type { Layout, StepSizes } from "./layout.ts";
import { groupsOf } from "./mesh.ts";
import type { GroupKind } from "./mesh.ts";
import { placeOfStage, stagesOf } from "./stages.ts";

/** What bytes are for. */
export const PURPOSES = [
  "tensor parallel", "cross entropy", "attention context", "Mamba-2 context", "expert dispatch", "pipeline",
  "gradients", "expert gradients", "parameters", "expert parameters", "embedding copy",
] as const;
export type Purpose = (typeof PURPOSES)[number];

/** One kind of collective among one kind of group, summed over a step. */
export interface TrafficRow {
  readonly purpose: Purpose;
  readonly group: GroupKind;
  readonly kind: CollectiveKind;
  readonly pass: "forward" | "backward" | "update";
  /** Collectives that a rank takes part in. */
  readonly calls: number;
  /** Bytes that a rank sends; the mean over a group where its ranks send unequally. */
  readonly bytes: number;
}

/** Bytes of a number on its way, by what it is. */
export interface TrafficWidths {
  readonly activation: number;
  readonly gradient: number;
  readonly parameter: number;
}

export interface TrafficOptions {
  /** Default: 4 bytes of everything. */
  readonly widths?: TrafficWidths;
  /** Depths of prediction in training; default 1 where the model has a prediction block. */
  readonly mtp_depths?: number;
  /**
   * Whether ranks with the same parameters share the optimiser's state (ZeRO-1): gradients are scattered and
   * parameters gathered then. Default: yes.
   */
  readonly zero?: boolean;
  /** Whether experts' outputs are weighed before the down projection ("activation"); default: after. */
  readonly weighing?: MoETraining["weighing"];
  /** Ranks of ep that the experts of a token lie on, for `flex`; default: the mean for random ones. */
  readonly ranks_of_token?: number;
}

const F32: TrafficWidths = { activation: 4, gradient: 4, parameter: 4 };

/** What each rank of every pipeline rank sends in a step. */
export function predictTraffic(
  layout: Layout, config: NemotronHConfig, sizes: StepSizes, options: TrafficOptions = {},
): TrafficRow[][] {
  const { widths = F32, zero = true } = options;
  const depths = config.num_nextn_predict_layers > 0 ? options.mtp_depths ?? 1 : 0;
  const ledgers = Array.from({ length: layout.pp }, () => new Ledger(layout, sizes.micro_batches));
  const stages = stagesOf(layout, config);
  const [chain, block] = [layerSpecs(config), mtpSpecs(config)];
  // Positions of a micro-batch on a rank: all that its cp part has, and its part of them under sp.
  const whole = (sizes.batch * sizes.seqlen) / layout.cp;
  const own = layout.sp ? whole / layout.tp : whole;
  const shape: Shape = {
    layout, config, whole, own, width: widths.activation, batch: sizes.batch,
    weighs: options.weighing === "activation", ranks_of_token: options.ranks_of_token ?? null,
  };
  const mtpStage = stages.findIndex(({ mtp }) => mtp);

  stages.forEach((stage, i) => {
    const ledger = ledgers[placeOfStage(layout, i).rank]!;
    if (stage.embedding) leave(ledger, shape);
    for (const spec of chain.slice(stage.from, stage.to)) addLayer(ledger, shape, spec);
    if (stage.mtp) {
      for (let depth = 0; depth < depths; depth++) {
        leave(ledger, shape);
        for (const spec of block) addLayer(ledger, shape, spec);
      }
    }
    if (stage.head) for (let depth = 0; depth <= depths; depth++) addLoss(ledger, shape);
    // From the prediction block on, the hidden states of all depths travel.
    const states = (after: number) => (mtpStage >= 0 && after >= mtpStage ? 1 + depths : 1);
    const message = own * config.hidden_size * widths.activation;
    if (i < stages.length - 1) ledger.send("pipeline", "pp", "forward", states(i) * message);
    if (i > 0) ledger.send("pipeline", "pp", "backward", states(i - 1) * message);
  });

  const copy = stages.findIndex(({ mtp, embedding }) => mtp && !embedding);
  holdingsOf(layout, config).forEach(({ dense, whole: replicated, shared, experts }, rank) => {
    const ledger = ledgers[rank]!;
    const g = widths.gradient;
    const reduce = (what: "" | "expert ", group: GroupKind, count: number, size = ledger.sizeOf(group)) => {
      const kind = zero ? "reduce_scatter" : "all_reduce";
      ledger.update(`${what}gradients`, group, kind, count * g, size);
      if (!zero) return;
      ledger.update(`${what}parameters`, group, "all_gather", (count * widths.parameter) / size, size);
    };
    reduce("", "dp-cp", dense - shared - (layout.sp ? replicated : 0));
    // Under sp a rank of tp has seen its own positions alone; without, all of them have the whole gradient.
    if (layout.sp) reduce("", "tp-dp-cp", replicated);
    // Some neighbours on tp have different queries of the same keys.
    const neighbours = layout.tp / Math.min(layout.tp, config.num_key_value_heads);
    reduce("", "tp-dp-cp", shared, neighbours * layout.dp * layout.cp);
    reduce("expert ", "edp", experts);
    if (copy >= 0 && (rank === 0 || rank === placeOfStage(layout, copy).rank)) {
      const table = (config.vocab_size / layout.tp) * config.hidden_size * g;
      const parts = zero ? layout.dp * layout.cp : 1;
      ledger.send("embedding copy", "embedding", "update", table / parts);
    }
  });
  return ledgers.map((ledger) => ledger.rows());
}

/** Bytes of all rows. */
export function totalBytes(rows: readonly TrafficRow[]): number {
  return rows.reduce((sum, { bytes }) => sum + bytes, 0);
}

/** What the bytes of a layer follow from. */
interface Shape {
  readonly layout: Layout;
  readonly config: NemotronHConfig;
  readonly batch: number;
  readonly whole: number;
  readonly own: number;
  /** Bytes of an activation. */
  readonly width: number;
  /** Whether weights travel with the rows of tokens. */
  readonly weighs: boolean;
  readonly ranks_of_token: number | null;
}

/** What one pipeline rank sends. */
class Ledger {
  readonly #layout: Layout;
  readonly #micros: number;
  readonly #rows = new Map<string, TrafficRow>();

  constructor(layout: Layout, micros: number) {
    this.#layout = layout;
    this.#micros = micros;
  }

  sizeOf(group: GroupKind): number {
    return groupsOf(this.#layout, group)[0]!.length;
  }

  /** A collective of each micro-batch, before which a rank holds `bytes`, among `size` ranks of the group. */
  pass(
    purpose: Purpose, group: GroupKind, kind: CollectiveKind, pass: "forward" | "backward", bytes: number,
    size = this.sizeOf(group),
  ): void {
    this.#add({ purpose, group, kind, pass }, bytes, size, this.#micros);
  }

  /** A collective of the update, among `size` ranks. */
  update(purpose: Purpose, group: GroupKind, kind: CollectiveKind, bytes: number, size: number): void {
    this.#add({ purpose, group, kind, pass: "update" }, bytes, size, 1);
  }

  /** A collective of each micro-batch in which a rank sends so many bytes. */
  put(
    purpose: Purpose, group: GroupKind, kind: CollectiveKind, pass: "forward" | "backward", sent: number,
  ): void {
    this.#put({ purpose, group, kind, pass }, sent * this.#micros, this.#micros);
  }

  /** Messages of each micro-batch, or of the update. */
  send(purpose: Purpose, group: GroupKind, pass: TrafficRow["pass"], bytes: number, times = 1): void {
    const calls = pass === "update" ? times : times * this.#micros;
    this.#put({ purpose, group, kind: "send", pass }, bytes * calls, calls);
  }

  #add(row: Omit<TrafficRow, "calls" | "bytes">, bytes: number, members: number, times: number): void {
    if (members === 1 || bytes === 0) return;
    const sent = bytesSent(row.kind, this.#layout.algorithm, members, bytes) / members;
    this.#put(row, sent * times, times);
  }

  #put(row: Omit<TrafficRow, "calls" | "bytes">, bytes: number, calls: number): void {
    const key = `${row.purpose}/${row.group}/${row.kind}/${row.pass}`;
    const before = this.#rows.get(key);
    this.#rows.set(key, {
      ...row, calls: calls + (before?.calls ?? 0), bytes: bytes + (before?.bytes ?? 0),
    });
  }

  rows(): TrafficRow[] {
    return [...this.#rows.values()];
  }
}

/** What column-parallel products read: all positions, and the sum of their gradients. */
function enter(ledger: Ledger, { layout, whole, own, config, width }: Shape): void {
  const bytes = (positions: number) => positions * config.hidden_size * width;
  if (layout.sp) ledger.pass("tensor parallel", "tp", "all_gather", "forward", bytes(own));
  ledger.pass("tensor parallel", "tp", layout.sp ? "reduce_scatter" : "all_reduce", "backward", bytes(whole));
}

/** What row-parallel products and the table give: a sum over tp. */
function leave(ledger: Ledger, { layout, whole, own, config, width }: Shape): void {
  const bytes = (positions: number) => positions * config.hidden_size * width;
  ledger.pass("tensor parallel", "tp", layout.sp ? "reduce_scatter" : "all_reduce", "forward", bytes(whole));
  if (layout.sp) ledger.pass("tensor parallel", "tp", "all_gather", "backward", bytes(own));
}

/** The head reads all positions; of a token's logits travel their log-sum-exp and the chosen one. */
function addLoss(ledger: Ledger, shape: Shape): void {
  enter(ledger, shape);
  ledger.pass("cross entropy", "tp", "all_gather", "forward", 4 * shape.whole);
  ledger.pass("cross entropy", "tp", "all_reduce", "forward", 4 * shape.whole);
}

function addLayer(ledger: Ledger, shape: Shape, spec: LayerSpec): void {
  if (spec.kind === "moe") {
    addExperts(ledger, shape, spec);
    if (spec.shared_size === 0) return;
  }
  enter(ledger, shape);
  if (spec.kind === "attention") addAttention(ledger, shape);
  if (spec.kind === "mamba") addScan(ledger, shape);
  leave(ledger, shape);
}

/** Keys and values go around, are gathered, or heads are exchanged for positions. */
function addAttention(ledger: Ledger, { layout, config, whole, width }: Shape): void {
  const { tp, cp, cp_kind: kind } = layout;
  if (cp === 1) return;
  const { num_attention_heads: heads, head_dim: dim } = config;
  const keyHeads = Math.max(1, config.num_key_value_heads / tp);
  const keys = whole * 2 * keyHeads * dim * width;
  const what = "attention context";
  const goRound = (ranks: number) => {
    if (ranks === 1) return;
    ledger.send(what, "cp", "forward", keys, ranks - 1);
    // Back from where they came, with their gradients.
    ledger.send(what, "cp", "backward", 2 * keys, ranks - 1);
  };
  const exchange = (ranks: number) => {
    const queries = whole * (heads / tp) * dim * width;
    // Fewer key heads than ranks are repeated, so that each rank gets those that its queries need.
    const repeated = keys * Math.max(1, ranks / keyHeads);
    for (const pass of ["forward", "backward"] as const) {
      for (const bytes of [queries, repeated / 2, repeated / 2, queries]) {
        ledger.pass(what, "cp", "all_to_all", pass, bytes, ranks);
      }
    }
  };
  switch (kind) {
    case "ring": return goRound(cp);
    case "alltoall": return exchange(cp);
    case "hierarchical": {
      const neighbours = neighboursOf(cp, keyHeads);
      exchange(neighbours);
      return goRound(cp / neighbours);
    }
    case "allgather":
      for (let i = 0; i < 2; i++) {
        ledger.pass(what, "cp", "all_gather", "forward", keys / 2);
        ledger.pass(what, "cp", "reduce_scatter", "backward", (cp * keys) / 2);
      }
  }
}

/** Heads are exchanged for positions before the convolution, and back after the scan; gates stay. */
function addScan(ledger: Ledger, { layout, config, whole, width }: Shape): void {
  const { tp, cp } = layout;
  const { mamba_num_heads: heads, mamba_head_dim: dim, n_groups: groups, ssm_state_size: state } = config;
  const inner = (heads / tp) * dim;
  const states = 2 * Math.max(groups / tp, cp) * state;
  for (const pass of ["forward", "backward"] as const) {
    for (const columns of [inner + states, heads / tp, inner]) {
      ledger.pass("Mamba-2 context", "cp", "all_to_all", pass, whole * columns * width);
    }
  }
}

/**
 * Tokens travel to their experts and back; backward passes go the same ways. Rows go directly under every
 * algorithm, and where they begin passes between the ranks before.
 */
function addExperts(
  ledger: Ledger, { layout, config, own, width, weighs, ranks_of_token }: Shape,
  spec: Extract<LayerSpec, { kind: "moe" }>,
): void {
  const { ep, etp, dispatcher } = layout;
  if (ep * etp === 1) return;
  const { num_experts_per_tok: chosen, n_routed_experts: experts, moe_latent_size: latent } = spec;
  const token = (latent ?? config.hidden_size) * width;
  const purpose = "expert dispatch";
  const both = etp === 1 ? "ep" : ep === 1 ? "etp" : "etp-ep";
  const counts = (group: GroupKind, groups: number) =>
    ledger.pass(purpose, group, "all_gather", "forward", 4 * (groups + 1));
  /**
   * Rows that a rank has for itself and the others alike, or over etp for all others: values of so many bytes
   * go there, of which the first `differentiable` have gradients, and a token comes back.
   */
  const exchange = (
    group: GroupKind, rows: number, there: readonly number[], differentiable = there.length,
  ) => {
    const [to, from]: [CollectiveKind, CollectiveKind] =
      group === "etp" ? ["all_gather", "reduce_scatter"] : ["all_to_all", "all_to_all"];
    const g = ledger.sizeOf(group);
    const others = group === "etp" ? rows * (g - 1) : (rows * (g - 1)) / g;
    for (const bytes of there) ledger.put(purpose, group, to, "forward", others * bytes);
    ledger.put(purpose, group, from, "forward", others * token);
    ledger.put(purpose, group, to, "backward", others * token);
    for (const bytes of there.slice(0, differentiable)) {
      ledger.put(purpose, group, from, "backward", others * bytes);
    }
  };
  switch (dispatcher) {
    case "alltoall": {
      // Weights come along where they are multiplied in before the last product; else tokens weigh.
      const there = weighs ? [token, 4] : [token];
      if (ep > 1) counts("ep", experts);
      if (ep > 1) exchange("ep", own * chosen, there);
      if (etp > 1) counts("etp", experts / ep);
      if (etp > 1) exchange("etp", own * chosen, there);
      return;
    }
    case "allgather": {
      const all = ep * etp * own;
      // Every token with the weights and numbers of its experts, of which the numbers have no gradients.
      for (const bytes of [token, 4 * chosen, 4 * chosen]) {
        ledger.pass(purpose, both, "all_gather", "forward", own * bytes);
      }
      ledger.pass(purpose, both, "reduce_scatter", "forward", all * token);
      ledger.pass(purpose, both, "all_gather", "backward", own * token);
      for (const bytes of [token, 4 * chosen]) {
        ledger.pass(purpose, both, "reduce_scatter", "backward", all * bytes);
      }
      return;
    }
    case "flex": {
      // One copy per rank with experts of the token, for all who share these, with their weights and numbers.
      const copies = own * (ranks_of_token ?? expectedRanks(ep, chosen)) * (ep > 1 ? etp : 1);
      counts(both, ep);
      exchange(both, copies, [token, 4 * chosen, 4 * chosen], 2);
    }
  }
}

/** Expected number of the `ep` ranks that `chosen` experts of a token lie on, each on any rank alike. */
export function expectedRanks(ep: number, chosen: number): number {
  return ep * (1 - (1 - 1 / ep) ** chosen);
}
