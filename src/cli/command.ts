/** What a command of the command line is made of. */
import type { Environment, TextStream } from "./terminal.ts";

interface OptionBase {
  /** One line for `--help`; default, limits and choices are added to it. */
  readonly help: string;
  /** One letter: `-n`. */
  readonly short?: string;
  /** What stands for the value in the help: `--out FILE`. */
  readonly value?: string;
}

/** A text, or one of `choices`. With `multiple` the flag may be repeated and gives a list. */
export interface StringOption extends OptionBase {
  readonly type: "string";
  readonly choices?: readonly string[];
  readonly default?: string;
  readonly required?: boolean;
  readonly multiple?: boolean;
  /** What the flag means without a value. */
  readonly alone?: string;
}

/** A number within min..max. */
export interface NumberOption extends OptionBase {
  readonly type: "integer" | "number";
  readonly min?: number;
  readonly max?: number;
  readonly default?: number;
  readonly required?: boolean;
}

/** A switch: `--name`, and `--no-name` for the contrary. */
export interface BooleanOption extends OptionBase {
  readonly type: "boolean";
  readonly default?: boolean;
}

export type OptionSpec = StringOption | NumberOption | BooleanOption;
/** Names in camelCase; `maxSteps` is `--max-steps` on the command line. */
export type OptionSpecs = Readonly<Record<string, OptionSpec>>;

type Single<O extends OptionSpec> = O extends BooleanOption ? boolean
  : O extends NumberOption ? number
    : O extends { readonly choices: readonly (infer Choice)[] } ? Choice : string;
type Value<O extends OptionSpec> = O extends { readonly multiple: true } ? readonly Single<O>[]
  : O extends BooleanOption | { readonly default: string | number } | { readonly required: true } ? Single<O>
    : Single<O> | undefined;
export type OptionValues<S extends OptionSpecs> = { readonly [K in keyof S]: Value<S[K]> };

export interface Positional {
  /** In capitals: `PATH`. */
  readonly name: string;
  readonly help: string;
  readonly optional?: boolean;
  /** Takes all that follow; the last positional only. */
  readonly many?: boolean;
}

export interface CliIo {
  readonly stdout: TextStream;
  readonly stderr: TextStream;
  readonly env: Environment;
}

export interface CommandContext<S extends OptionSpecs> extends CliIo {
  readonly options: OptionValues<S>;
  /** Positional arguments in order. */
  readonly args: readonly string[];
  /** Aborted by the first Ctrl-C (SIGINT) or SIGTERM: finish what must be finished and return or throw. */
  readonly signal: AbortSignal;
}

export interface CommandSpec<S extends OptionSpecs> {
  readonly name: string;
  readonly summary: string;
  /** Paragraphs for the command's own help. */
  readonly description?: string;
  readonly positionals?: readonly Positional[];
  readonly options: S;
  /**
   * When nobody reads standard output any more the command is interrupted, and saves what it has, instead of
   * ending at once.
   */
  readonly savesWhenLeft?: boolean;
  /** Whole command lines. */
  readonly examples?: readonly string[];
  /** Returns the exit code; nothing means 0, or 130 when interrupted. */
  run(context: CommandContext<S>): Promise<number | void> | number | void;
}

export interface Command extends Omit<CommandSpec<OptionSpecs>, "run"> {
  /** Parses the arguments after the command's name and runs it. */
  start(argv: readonly string[], io: CliIo & { readonly signal: AbortSignal }): Promise<number | void>;
}
