import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { tensorFiles } from "../../compress/export.ts";
import { checkFree, openFolder, writeFolder } from "../../io/files.node.ts";
import { isObject, parseJson } from "../../io/json.ts";
import { openTensors } from "../../io/safetensors.ts";
import { checkMegatron, megatronFiles, megatronRanks, openMegatron } from "../../parallel/megatron.ts";
import { CONVERT_SCRIPT, launchOf, launchScript } from "../../train/megatron_launch.ts";
import { formatLayout, worldOf } from "../../parallel/layout.ts";
import { UsageError } from "../../tensor/errors.ts";
import { makeRecipe } from "../../train/recipe.ts";
import type { Recipe } from "../../train/recipe.ts";
import { defineCommand } from "../args.ts";
import { givenLayout } from "../given_layout.ts";
import { findConfig, modelFolder } from "../models.ts";

const FORMATS = ["megatron", "checkpoint"] as const;

/** Files beside the weights that stay with a model. */
const COMPANIONS = ["tokenizer.json", "tokenizer_config.json"];

export const exportCommand = defineCommand({
  name: "export",
  summary: "Write a checkpoint for Megatron Core, or read one written so back.",
  description:
    "megatron: Megatron Core's parameters, cut over the ranks of a layout, one safetensors file per "
    + "model-parallel rank, with launch arguments for the same model and layout and a Python script that "
    + "makes Megatron Core's own checkpoint of them. checkpoint: the published layout again, bit for bit.",
  positionals: [{ name: "FORMAT", help: `${FORMATS.join(" or ")}.` }],
  options: {
    model: {
      type: "string", value: "DIR", required: true,
      help: "A checkpoint folder or a training run's; for checkpoint: a folder that export megatron wrote.",
    },
    layout: { type: "string", help: "For megatron: tp=2,pp=2,ep=4,..., as krait layout has it." },
    out: { type: "string", value: "DIR", required: true, help: "The folder to write; must not exist." },
    json: { type: "boolean", help: "Print one JSON object instead of text." },
  },
  examples: [
    "krait export megatron --layout tp=2,pp=2,dp=2,ep=4 --model runs/first --out first-megatron",
    "krait export checkpoint --model first-megatron --out first-again",
  ],
  async run({ options, args, stdout }) {
    const [format] = args;
    const { model, out } = options;
    await checkFree(out);
    let facts: Record<string, unknown>;
    let text: string;
    if (format === "megatron") {
      if (options.layout === undefined) throw new UsageError("The option --layout is required for megatron.");
      ({ facts, text } = await toMegatron(model, options.layout, out));
    } else if (format === "checkpoint") {
      if (options.layout !== undefined) throw new UsageError("--layout is part of the folder: leave it out.");
      ({ facts, text } = await fromMegatron(model, out));
    } else {
      throw new UsageError(`The format must be one of ${FORMATS.join(", ")}, found "${format!}".`);
    }
    stdout.write(options.json ? `${JSON.stringify(facts)}\n` : text);
  },
});

interface Exported {
  readonly facts: Record<string, unknown>;
  readonly text: string;
}

async function toMegatron(path: string, layoutText: string, out: string): Promise<Exported> {
  const folder = modelFolder(path);
  const config = findConfig(folder);
  const layout = givenLayout(layoutText);
  checkMegatron(config, layout);
  const launch = launchOf(config, layout, trainingOf(folder));
  const reader = await openTensors(openFolder(folder));
  try {
    await writeFolder(out, {
      "config.json": readFileSync(join(folder, "config.json")),
      ...companionsOf(folder),
      ...megatronFiles(config, reader, layout, folder),
      "args.json": `${JSON.stringify(launch, null, 1)}\n`,
      "megatron_args.sh": launchScript(launch),
      "convert_to_torch.py": CONVERT_SCRIPT,
    });
  } finally {
    await reader.close();
  }
  const files = megatronRanks(layout).length;
  return {
    facts: { out, layout: formatLayout(layout), world: worldOf(layout), files },
    text: `Wrote ${out}: ${files} model-parallel ranks of a layout of ${worldOf(layout)}.\n`
      + `Next: python ${join(out, "convert_to_torch.py")} CONVERTED, then Megatron Core with `
      + `${join(out, "megatron_args.sh")}.\n`,
  };
}

async function fromMegatron(path: string, out: string): Promise<Exported> {
  const { config, entries, layout, close } = await openMegatron(openFolder(path));
  try {
    await writeFolder(out, {
      "config.json": readFileSync(join(path, "config.json")), ...companionsOf(path), ...tensorFiles(entries),
    });
  } finally {
    await close();
  }
  return {
    facts: { out, layout: formatLayout(layout), tensors: entries.length, layers: config.num_hidden_layers },
    text: `Wrote ${out}: ${entries.length} tensors of ${path}.\n`,
  };
}

function companionsOf(folder: string): Record<string, Uint8Array> {
  const present = COMPANIONS.filter((file) => existsSync(join(folder, file)));
  return Object.fromEntries(present.map((file) => [file, readFileSync(join(folder, file))]));
}

/** The numbers of the run whose checkpoint a folder is; null for a model alone. */
function trainingOf(folder: string): Recipe | null {
  const file = join(folder, "state.json");
  if (!existsSync(file)) return null;
  const state = parseJson(readFileSync(file), { what: file });
  if (!isObject(state) || !isObject(state["recipe"])) return null;
  // Older runs lack what was added since: their defaults then.
  return makeRecipe(state["recipe"] as Partial<Recipe>);
}
