/** The texts of `--help`. */
import type { Command, OptionSpec, Positional } from "./command.ts";
import { wrap } from "./terminal.ts";

const WIDTH = 96;
const COLUMN = 28;

/** camelCase to the spelling on the command line: maxSteps -> max-steps. */
export function flag(key: string): string {
  return key.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`);
}

/** The help of the whole program: its commands with a line each. */
export function overview(program: string, summary: string, commands: readonly Command[]): string {
  return [
    `${program}: ${summary}`,
    "",
    `Usage: ${program} COMMAND [options]`,
    "",
    "Commands:",
    ...commands.flatMap((command) => entry(command.name, command.summary, 16)),
    "",
    `Run "${program} COMMAND --help" for a command's options and examples.`,
  ].join("\n");
}

/** The help of one command. */
export function commandHelp(program: string, command: Command): string {
  const { positionals = [], examples = [] } = command;
  const lines = [
    `${program} ${command.name}: ${command.summary}`,
    "",
    `Usage: ${[program, command.name, "[options]", ...positionals.map(positionalText)].join(" ")}`,
  ];
  if (command.description !== undefined) {
    lines.push("", ...command.description.trim().split(/\n\s*\n/).flatMap((paragraph, index) => {
      return index === 0 ? wrap(paragraph, WIDTH) : ["", ...wrap(paragraph, WIDTH)];
    }));
  }
  if (positionals.length > 0) {
    lines.push("", "Arguments:", ...positionals.flatMap((p) => entry(positionalText(p), p.help, COLUMN)));
  }
  lines.push("", "Options:");
  for (const [key, option] of Object.entries(command.options)) lines.push(...optionHelp(flag(key), option));
  lines.push(...entry("-h, --help", "Show this help.", COLUMN));
  if (examples.length > 0) lines.push("", "Examples:", ...examples.map((example) => `  ${example}`));
  return lines.join("\n");
}

function optionHelp(name: string, option: OptionSpec): string[] {
  const negatable = option.type === "boolean" && option.default === true;
  const standIn = option.value ?? (option.type === "string" ? "TEXT" : "N");
  const short = option.short === undefined ? "    " : `-${option.short}, `;
  const facts: string[] = [];
  if (option.type === "string" && option.choices) facts.push(`one of ${option.choices.join(", ")}`);
  if (option.type === "string" && option.multiple) facts.push("may be repeated");
  if (option.type !== "boolean" && option.required) facts.push("required");
  if (option.type !== "boolean" && option.default !== undefined) facts.push(`default ${option.default}`);
  if (negatable) facts.push("on by default");
  const help = `${option.help}${facts.length > 0 ? ` (${facts.join("; ")})` : ""}`;
  const spelling = `${short}--${negatable ? "[no-]" : ""}${name}`;
  const value = option.type === "string" && option.alone !== undefined ? `[${standIn}]` : standIn;
  return entry(option.type === "boolean" ? spelling : `${spelling} ${value}`, help, COLUMN);
}

function positionalText({ name, optional, many }: Positional): string {
  const text = many ? `${name}...` : name;
  return optional ? `[${text}]` : text;
}

/** A name and its text in two columns; a long name has a line of its own. */
function entry(name: string, text: string, column: number): string[] {
  const lines = wrap(text, WIDTH - column - 2);
  const indent = " ".repeat(column + 2);
  if (name.length > column - 2) return [`  ${name}`, ...lines.map((line) => indent + line)];
  return [`  ${name.padEnd(column)}${lines[0] ?? ""}`, ...lines.slice(1).map((line) => indent + line)];
}
