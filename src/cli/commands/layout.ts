import type { NemotronHConfig } from "../../models/config.ts";
import { parseRecompute, type Recompute } from "../../nn/recompute.ts";
import { holdingsOf } from "../../parallel/holdings.ts";
import { checkLayout, formatLayout, worldOf } from "../../parallel/layout.ts";
import type { Layout, StepSizes } from "../../parallel/layout.ts";
import { predictHeld } from "../../parallel/held.ts";
import { coordinatesOf, GROUP_KINDS, groupsOf, ranksPerStage, stageRanks } from "../../parallel/mesh.ts";
import type { GroupKind } from "../../parallel/mesh.ts";
import { bubbleFraction, liveMicroBatches, scheduleOf } from "../../parallel/schedule.ts";
import { placeOfStage, stagesOf } from "../../parallel/stages.ts";
import { predictTraffic, PURPOSES, totalBytes } from "../../parallel/traffic.ts";
import type { TrafficRow } from "../../parallel/traffic.ts";
import { defineCommand } from "../args.ts";
import { givenLayout } from "../given_layout.ts";
import { findConfig } from "../models.ts";
import { colours, formatBytes, formatCount, table, wantsColour } from "../terminal.ts";

export const layout = defineCommand({
  name: "layout",
  summary: "Show a parallel layout: ranks, groups, stages, bytes held and moved.",
  description: `
    LAYOUT is key=value with commas between. tp, cp, pp, dp: ranks of tensor, context, pipeline and data
    parallelism; ep, etp: ranks that share the experts, and the width of each. Axes that are missing are 1,
    etp among them (Megatron Core's default for it is tp). A dp that is missing is what is left of --world.
    Further keys: vpp (chunks of a pipeline rank), group (micro-batches per group of an interleaved schedule;
    pp), sp=on|off (on with tp), cp_kind=ring|allgather|alltoall|hierarchical,
    dispatch=alltoall|allgather|flex, overlap=on|off (passes in pairs, so that one computes while tokens of
    the other travel), algorithm=direct|ring, and last stages=TEXT (which layers lie in which stage).

    With a model, the layers of every stage, and the bytes that a rank holds and sends in a training step in
    f32. These are predictions from formulas, with tokens spread evenly over the experts.
  `,
  positionals: [{ name: "LAYOUT", help: "Such as tp=2,cp=2,pp=2,dp=1,ep=4,etp=1." }],
  options: {
    world: { type: "integer", min: 1, help: "Ranks there are." },
    model: { type: "string", value: "NAME|DIR", help: "A preset, a config.json or a model folder." },
    batch: { type: "integer", min: 1, default: 8, help: "Rows of a micro-batch of each replica." },
    seqlen: { type: "integer", min: 1, default: 128, help: "Positions per row." },
    microBatches: {
      type: "integer", min: 1, help: "Micro-batches of a step and replica (those of a group: pp).",
    },
    mtpDepths: {
      type: "integer", min: 0, default: 1, help: "Tokens beyond the next that the MTP head learns.",
    },
    zero: { type: "boolean", default: true, help: "Replicas share the optimiser's state (ZeRO-1)." },
    recompute: {
      type: "string", value: "WHAT", alone: "full", default: "off",
      help: "What runs a second time instead of being kept, as for krait train (off).",
    },
    json: { type: "boolean", help: "Print one JSON object instead of text." },
  },
  examples: [
    "krait layout tp=2,cp=2,pp=2,ep=4 --world 16",
    "krait layout pp=2,vpp=2,dp=2,ep=2 --model toy-moe --micro-batches 8",
  ],
  run({ options, args, stdout, env }) {
    const parsed = givenLayout(args[0]!, options.world);
    const sizes: StepSizes = {
      batch: options.batch, seqlen: options.seqlen,
      micro_batches: options.microBatches ?? parsed.micro_batch_group,
    };
    const config = options.model === undefined ? null : findConfig(options.model);
    const facts = examine(parsed, config, sizes, {
      mtp_depths: options.mtpDepths, zero: options.zero, recompute: parseRecompute(options.recompute),
    });
    stdout.write(options.json ? `${JSON.stringify(facts, null, 2)}\n`
      : render(facts, parsed, colours(wantsColour(stdout, env))));
  },
});

interface Training {
  readonly mtp_depths: number;
  readonly zero: boolean;
  readonly recompute: Recompute;
}

function examine(parsed: Layout, config: NemotronHConfig | null, sizes: StepSizes, training: Training) {
  const groups = Object.fromEntries(GROUP_KINDS.map((kind) => [kind, groupsOf(parsed, kind)]));
  /** Each with the number of its group of every kind. */
  const ranks = Array.from({ length: worldOf(parsed) }, (_, rank) =>
    ({ rank, ...coordinatesOf(parsed, rank), groups: {} as Partial<Record<GroupKind, number>> }));
  for (const kind of GROUP_KINDS) {
    groups[kind]!.forEach((members, i) => members.forEach((rank) => (ranks[rank]!.groups[kind] = i)));
  }
  if (config) checkLayout(parsed, config, sizes);
  const schedule = scheduleOf(parsed, sizes.micro_batches);
  const stages = config && stagesOf(parsed, config);
  return {
    layout: formatLayout(parsed), sizes: parsed, world: worldOf(parsed), groups, ranks,
    stages: Array.from({ length: parsed.pp * parsed.vpp }, (_, i) => {
      const held = stages?.[i];
      const pattern = held && config!.hybrid_override_pattern.slice(held.from, held.to);
      return { stage: i, ...placeOfStage(parsed, i), ...(held ? { holds: { ...held, pattern } } : {}) };
    }),
    schedule: {
      micro_batches: sizes.micro_batches, live: liveMicroBatches(schedule), bubble: bubbleFraction(schedule),
    },
    ...(config ? { step: sizes, pipeline_ranks: predict(parsed, config, sizes, training) } : {}),
  };
}

/** What each rank of every pipeline rank holds and sends in a step. */
function predict(parsed: Layout, config: NemotronHConfig, sizes: StepSizes, training: Training) {
  const traffic = predictTraffic(parsed, config, sizes, training);
  const held = predictHeld(parsed, config, sizes, { ...training, ...ON_GPUS });
  return holdingsOf(parsed, config).map(({ dense, experts, untrained }, rank) => {
    const { parameters, gradients, optimizer, activations } = held[rank]!;
    return {
      parameters: dense + experts + untrained, experts,
      parameter_bytes: parameters, gradient_bytes: gradients, optimizer_bytes: optimizer,
      activation_bytes: activations,
      sent_bytes: totalBytes(traffic[rank]!), traffic: traffic[rank]!,
    };
  });
}

/** How a run without further options goes, with the scan of GPUs. */
const ON_GPUS = { scan: "chunks", weighing: "output", balanced: true } as const;

const plural = (count: number, thing: string) => `${count} ${thing}${count === 1 ? "" : "s"}`;

type Facts = ReturnType<typeof examine>;

function render(facts: Facts, parsed: Layout, c: ReturnType<typeof colours>): string {
  const { tp, cp, dp, pp, etp, ep, edp } = parsed;
  const axes = ["tp", "cp", "dp", "pp", "etp", "ep", "edp"] as const;
  // Groups of one say nothing.
  const kinds = GROUP_KINDS.filter((kind) => facts.groups[kind]!.some((group) => group.length > 1));
  return [
    c.bold(facts.layout), "",
    `${plural(facts.world, "rank")}, ${plural(pp, "pipeline rank")} of ${ranksPerStage(parsed)}: `
    + `attention tp ${tp}, cp ${cp}, dp ${dp}; experts etp ${etp}, ep ${ep}, edp ${edp}`,
    ...(kinds.length > 0 ? ["", c.bold("Groups"), table(kinds.map((kind) =>
      [` ${kind}`, facts.groups[kind]!.map(listRanks).join(" ")]))] : []),
    "", c.bold("Ranks"),
    table([
      ["rank", ...axes, ...kinds.filter((kind) => !kind.includes("-")).map((kind) => `its ${kind}`)],
      ...facts.ranks.map((rank) => [
        String(rank.rank), ...axes.map((axis) => String(rank[axis])),
        ...kinds.filter((kind) => !kind.includes("-")).map((kind) => {
          const group = rank.groups[kind];
          return group === undefined ? "-" : listRanks(facts.groups[kind]![group]!);
        }),
      ]),
    ], { indent: " ", align: ["right", ...axes.map(() => "right" as const), "left"] }),
    "", c.bold("Stages"), table(facts.stages.map((stage) => renderStage(parsed, stage))),
    "", c.bold("Schedule"), table([
      [" micro-batches", String(facts.schedule.micro_batches)],
      [" alive at most, by pipeline rank", facts.schedule.live.join(" ")],
      [" bubble", `${(100 * facts.schedule.bubble).toFixed(1)} % of the working time`],
    ]),
    ...(facts.pipeline_ranks ? renderBytes(facts.pipeline_ranks, facts.step!, parsed, c) : []), "",
  ].join("\n");
}

function renderStage(parsed: Layout, stage: Facts["stages"][number]): string[] {
  const ranks = listRanks(stageRanks(parsed, stage.rank));
  const where = [` ${stage.stage}`, `ranks ${ranks}`, ...(parsed.vpp > 1 ? [`chunk ${stage.chunk}`] : [])];
  if (!stage.holds) return where;
  const { from, to, pattern, embedding, mtp, head } = stage.holds;
  const layers = from === to ? "no layers"
    : `${to - from === 1 ? `layer ${from}` : `layers ${from}-${to - 1}`} ${pattern}`;
  return [
    ...where,
    [embedding && "embedding", layers, mtp && "prediction block", head && "head"].filter(Boolean).join(", "),
  ];
}

function renderBytes(
  ranks: NonNullable<Facts["pipeline_ranks"]>, step: StepSizes, parsed: Layout,
  c: ReturnType<typeof colours>,
): string[] {
  const { batch, seqlen, micro_batches: micros } = step;
  const what = ({ purpose, group, kind, pass }: TrafficRow) => ` ${purpose}, ${kind} over ${group}, ${pass}`;
  const order = ({ purpose, pass }: TrafficRow) =>
    3 * PURPOSES.indexOf(purpose) + ["forward", "backward", "update"].indexOf(pass);
  const rows = [...new Set(
    ranks.flatMap(({ traffic }) => traffic).sort((a, b) => order(a) - order(b)).map(what))];
  const each = (name: string, value: (rank: (typeof ranks)[number]) => string) =>
    [` ${name}`, ...ranks.map(value)];
  const sent = (label: string, traffic: readonly TrafficRow[]) =>
    traffic.filter((row) => what(row) === label).reduce((sum, { bytes }) => sum + bytes, 0);
  return [
    "", c.bold(`Each rank, a step of ${micros} x ${batch} x ${seqlen} positions, f32`),
    table([
      ["", ...ranks.map((_, i) => `ranks ${listRanks(stageRanks(parsed, i))}`)],
      each("parameters", ({ parameters }) => formatCount(parameters)),
      each("weights", ({ parameter_bytes: bytes }) => formatBytes(bytes)),
      each("gradients", ({ gradient_bytes: bytes }) => formatBytes(bytes)),
      each("moments", ({ optimizer_bytes: bytes }) => formatBytes(bytes)),
      each("activations", ({ activation_bytes: bytes }) => formatBytes(bytes)),
      each("sends", ({ sent_bytes: bytes }) => formatBytes(bytes)),
      ...rows.map((row) => [` ${row}`, ...ranks.map(({ traffic }) => formatBytes(sent(row, traffic)))]),
    ]),
  ];
}

/** [0 2 4], or [0-7] where they follow each other; many at equal distances: [0-56 by 8]. */
function listRanks(ranks: readonly number[]): string {
  const [first, second = 0, third] = ranks as [number, ...number[]];
  const step = second - first;
  const isEven = third !== undefined && ranks.every((rank, i) => rank === first + i * step);
  if (!isEven || (step > 1 && ranks.length <= 8)) return `[${ranks.join(" ")}]`;
  return `[${first}-${ranks.at(-1)!}${step > 1 ? ` by ${step}` : ""}]`;
}
