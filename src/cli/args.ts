/** Commands with typed options: declaring, parsing and running them, and the exit codes. */
import { parseArgs } from "node:util";
import { GpuLayerError } from "../gpu/errors.ts";
import { KraitError, UsageError } from "../tensor/errors.ts";
import type {
  CliIo, Command, CommandSpec, NumberOption, OptionSpec, OptionSpecs, OptionValues, Positional, StringOption,
} from "./command.ts";
import { commandHelp, flag, overview } from "./help.ts";
import type { TextStream } from "./terminal.ts";

export type * from "./command.ts";

export const EXIT = { ok: 0, failed: 1, usage: 2, interrupted: 130 } as const;

/** Declares a command. The types of `context.options` follow from the option specs. */
export function defineCommand<const S extends OptionSpecs>(spec: CommandSpec<S>): Command {
  return {
    ...spec,
    async start(argv, io) {
      const parsed = parseCommand(spec, argv);
      return spec.run({ ...io, ...parsed });
    },
  };
}

/**
 * Parses a command's arguments to typed options and positionals.
 *
 * @throws UsageError  one sentence: the argument, what was expected, what was found; close spellings are
 *         suggested
 */
export function parseCommand<const S extends OptionSpecs>(
  spec: Pick<CommandSpec<S>, "options" | "positionals">,
  argv: readonly string[],
): { options: OptionValues<S>; args: string[] } {
  const specs = Object.entries<OptionSpec>(spec.options);
  const byFlag = new Map(specs.map(([key, option]) => [flag(key), { key, option }]));
  const { tokens } = parseArgs({
    args: [...argv],
    strict: false,
    tokens: true,
    allowPositionals: true,
    options: Object.fromEntries([...byFlag].map(([name, { option }]) => [name, {
      type: option.type === "boolean" || aloneOf(option) !== undefined
        ? "boolean" as const : "string" as const,
      ...(option.short === undefined ? {} : { short: option.short }),
    }])),
  });

  const values: Record<string, unknown> = {};
  const args: string[] = [];
  const taken = new Set<number>();
  for (const token of tokens) {
    if (token.kind === "positional" && !taken.has(token.index)) args.push(token.value);
    if (token.kind !== "option") continue;
    const negated = token.name.startsWith("no-") ? byFlag.get(token.name.slice(3)) : undefined;
    const found = byFlag.get(token.name) ?? (negated?.option.type === "boolean" ? negated : undefined);
    if (!found) throw unknownOption(token.rawName, [...byFlag.keys()]);
    const { key, option } = found;
    if (option.type === "boolean") {
      if (token.value !== undefined) {
        throw new UsageError(`${token.rawName} takes no value, found "${token.value}".`);
      }
      values[key] = found !== negated || byFlag.has(token.name);
      continue;
    }
    let given = token.value;
    const alone = aloneOf(option);
    if (alone !== undefined && given === undefined) {
      const next = tokens.find(({ index }) => index === token.index + 1);
      given = next?.kind === "positional" ? next.value : alone;
      taken.add(token.index + 1);
    }
    const value = readValue(option, token.rawName, given, token.inlineValue ?? false);
    if (option.type === "string" && option.multiple) values[key] = [...asList(values[key]), value];
    else values[key] = value;
  }
  for (const [name, { key, option }] of byFlag) {
    if (key in values) continue;
    if ("required" in option && option.required) throw new UsageError(`The option --${name} is required.`);
    if (option.type === "boolean") values[key] = option.default ?? false;
    else if (option.type === "string" && option.multiple) values[key] = asList(option.default);
    else values[key] = option.default;
  }
  checkPositionals(spec.positionals ?? [], args);
  // Every key of S has a value of its declared type by now; the loop hides that from the compiler.
  return { options: values as OptionValues<S>, args };
}

export interface CliOptions {
  /** The program's name. Default "krait". */
  readonly name?: string;
  readonly version: string;
  readonly summary: string;
  /** Default: the process's streams and environment. */
  readonly io?: CliIo;
  /**
   * Interrupts the command. Default: aborted by SIGINT and SIGTERM; a second one ends the process at once.
   */
  readonly signal?: AbortSignal;
}

/**
 * Runs the command that the first argument names and returns the exit code: 0 ok, 1 failed, 2 wrong usage,
 * 130 interrupted. Results and help go to standard output, errors to standard error.
 */
export async function runCli(
  commands: readonly Command[],
  argv: readonly string[],
  options: CliOptions,
): Promise<number> {
  let leave = (): void => process.exit(EXIT.ok);
  const { name = "krait", version, io = processIo(() => leave()) } = options;
  const { stdout, stderr, env } = io;
  const help = argv[0] === "help" ? argv.slice(1) : isHelp(argv[0]) || argv.length === 0 ? [] : null;
  if (argv[0] === "--version" || argv[0] === "-v") return print(stdout, version);
  if (help?.length === 0) return print(stdout, overview(name, options.summary, commands));

  const word = help?.[0] ?? argv[0]!;
  const command = commands.find((candidate) => candidate.name === word);
  if (!command) {
    const close = closest(word, commands.map((candidate) => candidate.name));
    stderr.write(`${name}: Unknown command "${word}"${close ? `; did you mean "${close}"?` : "."}\n`);
    stderr.write(`Run "${name} --help" for the list of commands.\n`);
    return EXIT.usage;
  }
  const rest = argv.slice(1);
  const end = rest.indexOf("--");
  const asksForHelp = help !== null || (end < 0 ? rest : rest.slice(0, end)).some(isHelp);
  if (asksForHelp) return print(stdout, commandHelp(name, command));

  const interrupt = options.signal
    ? { signal: options.signal, abort: () => {}, release: () => {} } : watchSignals();
  if (command.savesWhenLeft) leave = interrupt.abort;
  try {
    const code = await command.start(rest, { ...io, signal: interrupt.signal });
    return code ?? (interrupt.signal.aborted ? EXIT.interrupted : EXIT.ok);
  } catch (error) {
    if (interrupt.signal.aborted) {
      stderr.write(`${name} ${command.name}: Interrupted.\n`);
      return EXIT.interrupted;
    }
    stderr.write(`${name} ${command.name}: ${errorText(error, Boolean(env["KRAIT_DEBUG"]))}\n`);
    if (!(error instanceof UsageError)) return EXIT.failed;
    stderr.write(`Run "${name} ${command.name} --help" for its options.\n`);
    return EXIT.usage;
  } finally {
    interrupt.release();
  }
}

/**
 * The candidate that `word` was probably meant to be: at most a third of its letters differ, or it is a
 * beginning.
 */
export function closest(word: string, candidates: readonly string[]): string | undefined {
  const ranked = candidates
    .map((candidate) => ({ candidate, distance: editDistance(word, candidate) }))
    .sort((p, q) => p.distance - q.distance);
  const best = ranked[0];
  if (best && best.distance <= Math.max(1, Math.floor(word.length / 3))) return best.candidate;
  return word.length >= 2 ? candidates.find((candidate) => candidate.startsWith(word)) : undefined;
}

function aloneOf(option: OptionSpec): string | undefined {
  return option.type === "string" ? option.alone : undefined;
}

function readValue(
  option: StringOption | NumberOption, name: string, value: string | undefined, inline: boolean,
): string | number {
  if (value === undefined || value === "") throw new UsageError(`${name} needs a value.`);
  if (option.type === "string") {
    if (!inline && value.length > 1 && value.startsWith("-")) {
      throw new UsageError(`${name} needs a value; if that is "${value}", write ${name}=${value}.`);
    }
    if (option.choices && !option.choices.includes(value)) {
      const close = closest(value, option.choices);
      const hint = close ? `; did you mean "${close}"?` : ".";
      throw new UsageError(`${name} must be one of ${option.choices.join(", ")}, found "${value}"${hint}`);
    }
    return value;
  }
  const whole = option.type === "integer";
  const number = Number(value);
  const pattern = whole ? /^[+-]?\d+$/ : /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;
  if (!pattern.test(value) || !(whole ? Number.isSafeInteger(number) : Number.isFinite(number))) {
    throw new UsageError(`${name} needs ${whole ? "a whole number" : "a number"}, found "${value}".`);
  }
  const { min = -Infinity, max = Infinity } = option;
  if (number < min || number > max) {
    const upper = min === -Infinity ? `at most ${max}` : `from ${min} to ${max}`;
    const range = max === Infinity ? `at least ${min}` : upper;
    throw new UsageError(`${name} must be ${range}, found ${value}.`);
  }
  return number;
}

function checkPositionals(positionals: readonly Positional[], args: readonly string[]): void {
  const missing = positionals.find((positional, index) => !positional.optional && index >= args.length);
  if (missing) throw new UsageError(`The argument ${missing.name} is missing: ${missing.help}`);
  if (!positionals.at(-1)?.many && args.length > positionals.length) {
    throw new UsageError(`Unexpected argument "${args[positionals.length]!}".`);
  }
}

function unknownOption(name: string, known: readonly string[]): UsageError {
  const close = closest(name.replace(/^-+/, ""), [...known, "help"]);
  const hint = close && name.length > 2 ? `; did you mean --${close}?` : ".";
  return new UsageError(`Unknown option ${name}${hint}`);
}

function errorText(error: unknown, debug: boolean): string {
  if (!(error instanceof Error)) return String(error);
  // What Krait or the system reports explains itself; anything else is a defect, and its origin helps.
  const isOurs = error instanceof KraitError || error instanceof GpuLayerError;
  if (!debug && (isOurs || "syscall" in error)) return error.message;
  return error.stack ?? error.message;
}

/** Edit distance in which exchanging two neighbours counts as one edit. */
function editDistance(a: string, b: string): number {
  let before: number[] = [];
  let above = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const row = [i];
    for (let j = 1; j <= b.length; j++) {
      const change = above[j - 1]! + (a[i - 1] === b[j - 1] ? 0 : 1);
      row[j] = Math.min(above[j]! + 1, row[j - 1]! + 1, change);
      if (i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]) {
        row[j] = Math.min(row[j]!, before[j - 2]! + 1);
      }
    }
    [before, above] = [above, row];
  }
  return above[b.length]!;
}

function asList(value: unknown): readonly unknown[] {
  return value === undefined ? [] : Array.isArray(value) ? value : [value];
}

function isHelp(argument: string | undefined): boolean {
  return argument === "--help" || argument === "-h";
}

function print(stream: TextStream, text: string): number {
  stream.write(`${text}\n`);
  return EXIT.ok;
}

/**
 * A reader that closes a pipe early (`| head`) is no failure of ours. Nobody has to read standard error.
 * @param leave called when nobody reads standard output any more
 */
function processIo(leave: () => void): CliIo {
  const onClosed = (stream: NodeJS.WriteStream, then: () => void) =>
    stream.on("error", (error: NodeJS.ErrnoException) => {
      if (error.code !== "EPIPE") throw error;
      then();
    });
  onClosed(process.stdout, leave);
  onClosed(process.stderr, () => {});
  return { stdout: process.stdout, stderr: process.stderr, env: process.env };
}

function watchSignals(): { signal: AbortSignal; abort: () => void; release: () => void } {
  const controller = new AbortController();
  const stop = (): void => {
    if (controller.signal.aborted) process.exit(EXIT.interrupted);
    controller.abort();
  };
  process.on("SIGINT", stop);
  process.on("SIGTERM", stop);
  return {
    signal: controller.signal,
    abort: () => controller.abort(),
    release: () => {
      process.off("SIGINT", stop);
      process.off("SIGTERM", stop);
    },
  };
}
