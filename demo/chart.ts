/** The loss curve while it grows. */
import { type CurvePoint, movingAverage, niceTicks } from "krait";

const NAMESPACE = "http://www.w3.org/2000/svg";
const MARGIN = { left: 44, right: 12, top: 14, bottom: 28 };

export interface Baseline {
  readonly label: string;
  readonly value: number;
}

/** What the legend shows: the values at a step, or the latest. */
export interface Reading {
  /** Null: the latest. */
  readonly step: number | null;
  readonly train: number | undefined;
  readonly validation: number | undefined;
}

/** Draws into an SVG element, at most once per frame, and follows its size. */
export class Chart {
  readonly #svg: SVGSVGElement;
  readonly #onRead: (reading: Reading) => void;
  #steps = 1;
  #train: CurvePoint[] = [];
  #validation: CurvePoint[] = [];
  #baselines: readonly Baseline[] = [];
  #pointer: number | null = null;
  #frame = 0;

  /** @param onRead called with the values under the pointer, or the latest ones */
  constructor(svg: SVGSVGElement, onRead: (reading: Reading) => void) {
    this.#svg = svg;
    this.#onRead = onRead;
    new ResizeObserver(() => this.#redraw()).observe(svg);
    svg.addEventListener("pointermove", (event) => {
      this.#point(event.clientX - svg.getBoundingClientRect().left);
    });
    svg.addEventListener("pointerleave", () => this.#point(null));
  }

  /** Starts over with a run of that many steps. */
  reset(steps: number, baselines: readonly Baseline[]): void {
    this.#steps = steps;
    this.#train = [];
    this.#validation = [];
    this.#baselines = baselines;
    this.#redraw();
  }

  addStep(point: CurvePoint): void {
    this.#train.push(point);
    this.#redraw();
  }

  addEvaluation(point: CurvePoint): void {
    this.#validation.push(point);
    this.#redraw();
  }

  /** Everything drawn, for a picture of its own. */
  get data() {
    return { train: this.#train, validation: this.#validation, references: this.#baselines };
  }

  #point(x: number | null): void {
    this.#pointer = x;
    this.#redraw();
  }

  #redraw(): void {
    if (this.#frame === 0) this.#frame = requestAnimationFrame(() => this.#draw());
  }

  #draw(): void {
    this.#frame = 0;
    const { width, height } = this.#svg.getBoundingClientRect();
    if (width === 0) return;
    const [left, right] = [MARGIN.left, width - MARGIN.right];
    const [top, bottom] = [MARGIN.top, height - MARGIN.bottom];
    const losses = [...this.#train, ...this.#validation].map(({ loss }) => loss);
    const values = losses.concat(this.#baselines.map(({ value }) => value));
    const low = values.length === 0 ? 0 : values.reduce((a, b) => Math.min(a, b));
    const high = values.length === 0 ? 8 : values.reduce((a, b) => Math.max(a, b));
    const room = Math.max(0.05, (high - low) * 0.06);
    const [from, to] = [Math.max(0, low - room), high + room];
    const x = (step: number) => left + (step / this.#steps) * (right - left);
    const y = (loss: number) => bottom - ((loss - from) / (to - from)) * (bottom - top);
    const line = (points: readonly CurvePoint[]) =>
      points.map((p, i) => `${i === 0 ? "M" : "L"}${x(p.step).toFixed(1)} ${y(p.loss).toFixed(1)}`).join("");

    const yTicks = niceTicks(from, to, Math.max(2, Math.round(height / 60)));
    const digits = Math.max(...yTicks.map((tick) => String(tick).split(".")[1]?.length ?? 0));
    const xTicks = niceTicks(0, this.#steps, Math.max(2, Math.round(width / 110))).filter(Number.isInteger);
    const window = Math.max(1, Math.round(this.#train.length / 30));
    const means = movingAverage(this.#train.map(({ loss }) => loss), window);
    const smooth = means.map((loss, i) => ({ step: this.#train[i]!.step, loss }));
    const pointed = this.#pointer === null ? null : ((this.#pointer - left) / (right - left)) * this.#steps;
    const cursor = pointed === null ? null : nearest(this.#train, pointed);

    this.#svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.#svg.replaceChildren(
      ...yTicks.flatMap((tick) => [
        path("grid", `M${left} ${y(tick)}H${right}`),
        text(tick.toFixed(digits), left - 8, y(tick) + 4, "end"),
      ]),
      path("axis", `M${left} ${bottom}H${right}`),
      ...xTicks.map((tick) => {
        return text(String(tick), x(tick), bottom + 19, tick === this.#steps ? "end" : "middle");
      }),
      ...this.#baselines.map(({ value }) => path("baseline", `M${left} ${y(value)}H${right}`)),
      path("raw", line(this.#train)),
      path("train", line(smooth)),
      path("validation", line(this.#validation)),
      ...this.#validation.map((p) => {
        return make("circle", { class: "point", cx: x(p.step), cy: y(p.loss), r: 3.5 });
      }),
      // Two lines close together: the lower one has its name below.
      ...this.#baselines.map(({ label, value }, i) => {
        const above = this.#baselines[i - 1];
        const crowded = above !== undefined && y(value) - y(above.value) < 18;
        return text(`${label} ${value.toFixed(2)}`, right - 4, y(value) + (crowded ? 14 : -5), "end", "name");
      }),
      ...(cursor ? [path("cursor", `M${x(cursor.step)} ${top}V${bottom}`)] : []),
    );
    const until = cursor?.step ?? Infinity;
    const evaluation = this.#validation.findLast(({ step }) => step <= until);
    const train = cursor ?? smooth.at(-1);
    this.#svg.setAttribute("aria-label", this.#describe(smooth.at(-1), this.#validation.at(-1)));
    this.#onRead({ step: cursor?.step ?? null, train: train?.loss, validation: evaluation?.loss });
  }

  #describe(train: CurvePoint | undefined, validation: CurvePoint | undefined): string {
    if (!train) return "Loss by step: no steps yet";
    const parts = [`training ${train.loss.toFixed(2)}`];
    if (validation) parts.push(`validation ${validation.loss.toFixed(2)} at step ${validation.step}`);
    parts.push(...this.#baselines.map(({ label, value }) => `${label} ${value.toFixed(2)}`));
    return `Loss in bits per byte at step ${train.step} of ${this.#steps}: ${parts.join(", ")}`;
  }
}

function nearest(points: readonly CurvePoint[], step: number): CurvePoint | null {
  return points.reduce<CurvePoint | null>((best, point) => {
    return best && Math.abs(best.step - step) <= Math.abs(point.step - step) ? best : point;
  }, null);
}

function make(name: string, attributes: Readonly<Record<string, string | number>>, content = ""): SVGElement {
  const made = document.createElementNS(NAMESPACE, name) as SVGElement;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  made.textContent = content;
  return made;
}

function path(style: string, d: string): SVGElement {
  return make("path", { class: style, d });
}

function text(content: string, x: number, y: number, anchor: string, style = ""): SVGElement {
  return make("text", { class: style, x, y, "text-anchor": anchor }, content);
}
