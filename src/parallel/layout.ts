/** Parallel layouts by name: "tp=2,cp=2,pp=2,dp=1,ep=4,etp=1" to sizes and back, and the rules they obey. */
import { layerSpecs, mtpSpecs } from "../models/config.ts";
import type { LayerSpec, NemotronHConfig } from "../models/config.ts";
import { CONTEXT_KINDS, DISPATCHERS } from "../nn/division.ts";
import type { ContextKind, DispatcherKind } from "../nn/division.ts";
import { ALGORITHMS } from "../ops/collectives.ts";
import type { Algorithm } from "../ops/collectives.ts";
import { UsageError } from "../tensor/errors.ts";
import { attentionGrid, broken, checkPipelines, expertGrid, ranksPerStage, worldOf } from "./mesh.ts";
import type { MeshSizes } from "./mesh.ts";
import { checkGroups, checkPairing } from "./schedule.ts";
import { checkStages, stagesOf } from "./stages.ts";

export { worldOf } from "./mesh.ts";

/** How a model lies on the ranks. */
export interface Layout extends MeshSizes {
  /** Chunks per pipeline rank: pp * vpp stages in all, stage i on rank i mod pp as its chunk i / pp. */
  readonly vpp: number;
  /** Micro-batches that pass a chunk before the next chunk's turn; pp unless said otherwise. */
  readonly micro_batch_group: number;
  /** Sequence parallel: what lies between the tensor-parallel products is cut along the sequence. */
  readonly sp: boolean;
  /** How attention sees the whole sequence under cp. */
  readonly cp_kind: ContextKind;
  /** How tokens reach their experts. */
  readonly dispatcher: DispatcherKind;
  /** Passes run in pairs: where the tokens of one travel to their experts, the other computes. */
  readonly overlap: boolean;
  /** How collectives move their data. */
  readonly algorithm: Algorithm;
  /**
   * Rows of tokens that a rank's experts have room for, as a multiple of those of an even load; null: for all
   * that can come.
   */
  readonly expert_budget: number | null;
  /** Which layers lie in which stage, as a layout or pattern string; null: cut by cost. */
  readonly stages: string | null;
}

/** What is trained at a time. */
export interface StepSizes {
  /** Sequences in one micro-batch of one data-parallel replica. */
  readonly batch: number;
  readonly seqlen: number;
  /** Micro-batches of one replica in a step. */
  readonly micro_batches: number;
}

/** Most ranks that a text may ask for. */
const MAX_WORLD = 2 ** 16;
const NUMBERS = ["tp", "cp", "pp", "dp", "ep", "etp", "vpp", "group"] as const;
const CHOICES = {
  sp: ["on", "off"], cp_kind: CONTEXT_KINDS, dispatch: DISPATCHERS, overlap: ["on", "off"],
  algorithm: ALGORITHMS,
} as const;
const KEYS: readonly string[] = [...NUMBERS, ...Object.keys(CHOICES), "expert_budget", "stages"];

/**
 * Reads a layout: `key=value` with commas between. Axes that are missing are 1, etp among them; a missing dp
 * is what is left of `world`, where that is given. sp is on where tp > 1 unless switched off. `stages=` comes
 * last and takes the rest of the text, commas and all.
 * @param world number of ranks that the layout must have
 * @throws UsageError one sentence: the key or rule, what was expected, what was found
 */
export function parseLayout(text: string, world?: number): Layout {
  const values = readEntries(text);
  const number = (key: (typeof NUMBERS)[number]) => values.get(key) === undefined
    ? undefined : readNumber(key, values.get(key)!);
  const choice = <K extends keyof typeof CHOICES>(key: K): (typeof CHOICES)[K][number] | undefined => {
    const value = values.get(key);
    const list: readonly string[] = CHOICES[key];
    if (value === undefined || list.includes(value)) return value as (typeof CHOICES)[K][number] | undefined;
    throw new UsageError(`The layout's ${key} must be one of ${list.join(", ")}, found "${value}".`);
  };
  const [tp = 1, cp = 1, pp = 1, ep = 1, etp = 1] =
    [number("tp"), number("cp"), number("pp"), number("ep"), number("etp")];
  const dp = number("dp") ?? remaining(world, tp * cp * pp);
  const edp = (tp * cp * dp) / (etp * ep);
  const [vpp = 1, group] = [number("vpp"), number("group")];
  const layout: Layout = {
    tp, cp, dp, pp, ep, etp, edp, vpp, micro_batch_group: group ?? pp,
    sp: tp > 1 && choice("sp") !== "off",
    cp_kind: choice("cp_kind") ?? "ring", dispatcher: choice("dispatch") ?? "alltoall",
    overlap: choice("overlap") === "on", algorithm: choice("algorithm") ?? "direct",
    expert_budget: readBudget(values.get("expert_budget")),
    stages: values.get("stages") ?? null,
  };
  choice("sp");
  if (group !== undefined && vpp === 1) {
    broken("group needs interleaving", "vpp above 1", `group=${group} with vpp=1`);
  }
  checkShape(layout);
  if (world !== undefined && worldOf(layout) !== world) {
    broken("tp * cp * pp * dp is the world", `${world} ranks`, `${tp} * ${cp} * ${pp} * ${dp}`);
  }
  return layout;
}

/** The text of a layout, which parseLayout reads back to the same: all axes, then what is no default. */
export function formatLayout(layout: Layout): string {
  const { tp, cp, pp, dp, ep, etp } = layout;
  const entries: [string, unknown, unknown][] = [
    ["vpp", layout.vpp, 1], ["group", layout.micro_batch_group, layout.pp],
    ["sp", layout.sp ? "on" : "off", tp > 1 ? "on" : "off"], ["cp_kind", layout.cp_kind, "ring"],
    ["dispatch", layout.dispatcher, "alltoall"], ["overlap", layout.overlap ? "on" : "off", "off"],
    ["algorithm", layout.algorithm, "direct"], ["expert_budget", layout.expert_budget, null],
    ["stages", layout.stages, null],
  ];
  return [
    ...Object.entries({ tp, cp, pp, dp, ep, etp }).map(([key, value]) => `${key}=${value}`),
    ...entries.flatMap(([key, value, usual]) => value === usual ? [] : [`${key}=${String(value)}`]),
  ].join(",");
}

/**
 * Checks the rules that hold without a model: of the grids, interleaving, dispatchers and stages' texts.
 * @throws UsageError that names the rule, what it expects and what was found
 */
export function checkShape(layout: Layout): void {
  const { tp, cp, dp, pp, ep, etp, edp, vpp, micro_batch_group: group } = layout;
  if (worldOf(layout) > MAX_WORLD) {
    broken("a world has limits", `at most ${MAX_WORLD} ranks`, `${tp} * ${cp} * ${pp} * ${dp}`);
  }
  const stage = ranksPerStage(layout);
  if (stage % (etp * ep) !== 0) {
    broken("etp * ep divides tp * cp * dp, the ranks of a stage", `a divisor of ${stage}`, `${etp} * ${ep}`);
  }
  if (edp * etp * ep !== stage) {
    broken("etp * ep * edp is tp * cp * dp", `${stage}`, `${etp} * ${ep} * ${edp}`);
  }
  checkPipelines(attentionGrid(layout), expertGrid(layout));
  if (vpp > 1 && pp === 1) broken("interleaving needs a pipeline", "pp above 1", `pp=1 with vpp=${vpp}`);
  if (vpp > 1 && group < pp) {
    broken("an interleaved group has at least pp micro-batches", `group >= ${pp}`, group);
  }
  if (layout.dispatcher === "allgather" && etp !== tp) {
    const expected = `etp=${tp}, or dispatch=alltoall or flex`;
    broken("etp is tp under the allgather dispatcher", expected, `etp=${etp}`);
  }
  if (layout.overlap) {
    if (ep === 1) broken("overlap needs experts on several ranks", "ep above 1", "ep=1");
    if (layout.dispatcher === "allgather") {
      broken("overlap is for tokens that travel", "dispatch=alltoall or flex", "dispatch=allgather");
    }
    checkPairing(layout);
  }
  if (layout.expert_budget !== null && etp * ep === 1) {
    const found = `expert_budget=${layout.expert_budget} with etp * ep = 1`;
    broken("expert_budget needs experts on several ranks", "ep or etp above 1", found);
  }
  checkStages(layout);
}

/**
 * Checks that a model and a step fit a layout.
 * @throws UsageError that names the rule, what it expects and what was found
 */
export function checkLayout(layout: Layout, config: NemotronHConfig, sizes: StepSizes): void {
  checkShape(layout);
  checkModel(layout, config);
  checkStep(layout, sizes);
}

/** The part of checkLayout that asks for no step. */
export function checkModel(layout: Layout, config: NemotronHConfig): void {
  const { tp } = layout;
  divides("tp divides the vocabulary", "vocab_size", config.vocab_size, "tp", tp);
  const specs = [...layerSpecs(config), ...mtpSpecs(config)];
  // One layer of each width is enough: layers of a kind differ in nothing else that is cut.
  for (const spec of new Map(specs.map((each) => [JSON.stringify(each), each])).values()) {
    checkLayer(layout, config, spec);
  }
  stagesOf(layout, config);
}

function checkStep(layout: Layout, sizes: StepSizes): void {
  for (const key of ["batch", "seqlen", "micro_batches"] as const) {
    const value = sizes[key];
    if (Number.isSafeInteger(value) && value >= 1) continue;
    broken(`${key} is a count`, "a whole number above 0", value);
  }
  const { tp, cp, pp, vpp, sp, micro_batch_group: group } = layout;
  const { seqlen, micro_batches: micros } = sizes;
  if (cp > 1) divides("2 * cp divides the sequence", "seqlen", seqlen, "2 * cp", 2 * cp);
  if (sp) divides("cp * tp divides the sequence under sp", "seqlen", seqlen, "cp * tp", cp * tp);
  if (vpp === 1) return;
  checkGroups(pp, micros, group);
}

function checkLayer(layout: Layout, config: NemotronHConfig, spec: LayerSpec): void {
  const { tp, cp, ep, etp } = layout;
  switch (spec.kind) {
    case "mamba": {
      const { mamba_num_heads: heads, n_groups: groups } = config;
      divides("tp divides the Mamba heads", "mamba_num_heads", heads, "tp", tp);
      divides("tp divides the Mamba groups", "n_groups", groups, "tp", tp);
      divides("cp divides the Mamba heads of a rank", "mamba_num_heads / tp", heads / tp, "cp", cp);
      eitherDivides("cp and the Mamba groups of a rank", "n_groups / tp", groups / tp, "cp", cp);
      return;
    }
    case "attention": {
      const { num_attention_heads: heads, num_key_value_heads: kv } = config;
      divides("tp divides the query heads", "num_attention_heads", heads, "tp", tp);
      eitherDivides("tp and the key-value heads", "num_key_value_heads", kv, "tp", tp);
      if (layout.cp_kind !== "alltoall") return;
      const rule = "cp divides the query heads of a rank under cp_kind=alltoall";
      divides(rule, "num_attention_heads / tp", heads / tp, "cp", cp);
      const local = Math.max(1, kv / tp);
      eitherDivides("cp and the key-value heads of a rank", "key-value heads of a rank", local, "cp", cp);
      return;
    }
    case "mlp":
      divides("tp divides the MLP", "intermediate_size", spec.intermediate_size, "tp", tp);
      return;
    case "moe":
      divides("ep divides the experts", "n_routed_experts", spec.n_routed_experts, "ep", ep);
      divides(
        "etp divides the experts' width", "moe_intermediate_size", spec.moe_intermediate_size, "etp", etp);
      if (spec.shared_size > 0) {
        const name = "moe_shared_expert_intermediate_size";
        divides("tp divides the shared expert", name, spec.shared_size, "tp", tp);
      }
      if (tp > 1 && !layout.sp) broken("tp > 1 with experts needs sp", "sp=on", `sp=off with tp=${tp}`);
  }
}

function readEntries(text: string): Map<string, string> {
  const [, plain = "", stages] = /^(.*?)(?:(?:^|,)\s*stages\s*=(.*))?$/s.exec(text)!;
  const values = new Map<string, string>();
  const isEmpty = plain.trim() === "";
  for (const entry of isEmpty ? [] : plain.split(",")) {
    const [, key, value] = /^\s*(\w+)\s*=\s*(\S*)\s*$/.exec(entry) ?? [];
    if (key === undefined || value === undefined) {
      throw new UsageError(`A layout is key=value with commas between, found "${entry.trim()}".`);
    }
    if (key === "edp") {
      throw new UsageError("The layout's edp is tp * cp * dp / (etp * ep): expected no edp, found one.");
    }
    if (!KEYS.includes(key)) {
      throw new UsageError(`A layout's key must be one of ${KEYS.join(", ")}, found "${key}".`);
    }
    if (values.has(key)) throw new UsageError(`The layout's ${key} must stand once, found it twice.`);
    values.set(key, value);
  }
  if (stages !== undefined) values.set("stages", stages.trim());
  return values;
}

function readNumber(key: string, value: string): number {
  if (/^\d{1,7}$/.test(value) && Number(value) >= 1 && Number(value) <= MAX_WORLD) return Number(value);
  throw new UsageError(
    `The layout's ${key} must be a whole number from 1 to ${MAX_WORLD}, found "${value}".`);
}

function readBudget(value: string | undefined): number | null {
  if (value === undefined) return null;
  if (/^\d{1,6}(\.\d{1,6})?$/.test(value) && Number(value) >= 1) return Number(value);
  throw new UsageError(`The layout's expert_budget must be a number of at least 1, found "${value}".`);
}

/** The dp that fills the world. */
function remaining(world: number | undefined, others: number): number {
  if (world === undefined) return 1;
  if (world % others === 0 && world >= others) return world / others;
  return broken("tp * cp * pp divides the world", `a divisor of ${world}`, others);
}

function divides(rule: string, what: string, size: number, axis: string, by: number): void {
  if (size % by !== 0) broken(rule, `${what} in multiples of ${axis} = ${by}`, size);
}

function eitherDivides(things: string, what: string, size: number, axis: string, by: number): void {
  if (size % by === 0 || by % size === 0) return;
  broken(`${things} divide each other`, `${what} to be a multiple or divisor of ${axis} = ${by}`, size);
}
