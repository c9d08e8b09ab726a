// Form fields made from the server's own description of its request fields. The server checks the values.

/** A label, an input or a list, a hint with its bounds, and a place for an error. */
export class Field {
  /**
   * spec: one of `fields` of `/v1/kv_compression`. label: shown in place of its name. value: the initial value; if it
   * is empty, the field is not sent, and the server uses its default.
   */
  constructor(spec, { id = spec.name, label = spec.name, value = "" } = {}) {
    this.name = spec.name;
    this.type = spec.type;
    this.control = makeControl(spec, value);
    this.control.id = id;
    this.control.setAttribute("aria-describedby", `${id}-hint ${id}-error`);
    this.control.addEventListener("input", () => this.showError("")); // the error was about the old value
    this.error = element("p", { id: `${id}-error`, className: "error", role: "alert" });
    this.root = element("div", { className: "field" });
    const bounds = boundsOf(spec.bounds).choices ? "" : spec.bounds; // a list shows its choices
    const hint = [spec.description, bounds].filter(Boolean).join(" ");
    this.root.append(
      element("label", { htmlFor: id, textContent: label }),
      this.control,
      element("p", { id: `${id}-hint`, className: "hint", textContent: hint }),
      this.error,
    );
  }

  /** The value to send; `undefined` for an empty field. Throws if the input is not a number. */
  read() {
    if (this.control.validity.badInput) throw new Error(`${this.name} must be a number.`);
    const { value } = this.control;
    if (value === "") return undefined;
    return this.type === "string" ? value : Number(value);
  }

  showError(message) {
    this.error.textContent = message;
    this.control.setAttribute("aria-invalid", message ? "true" : "false");
    if (!message) return;
    this.control.closest("details")?.setAttribute("open", "");
    this.control.focus();
  }
}

/** The minimum and the maximum, or the choices, from the text of a field's bounds. */
export function boundsOf(text) {
  const choices = /^one of (.+)$/.exec(text);
  if (choices) return { choices: choices[1].split(", ") };
  const range = /^(\S+) <=? \w+ <= (\S+)$/.exec(text);
  return range ? { min: range[1], max: range[2] } : {};
}

function makeControl(spec, value) {
  const { choices, min, max } = boundsOf(spec.bounds);
  if (choices) {
    const control = element("select");
    control.append(new Option(`the server's default, ${spec.default}`, ""), ...choices.map((choice) => new Option(choice)));
    return control;
  }
  const placeholder = spec.default === null ? "" : `the server's default, ${spec.default}`;
  const control = element("input", { type: "number", placeholder, value });
  // For the arrow keys. A value out of bounds is sent anyway, and the server answers with the error.
  Object.assign(control, { step: spec.type === "integer" ? 1 : 0.05, min: min ?? "", max: max ?? "" });
  return control;
}

function element(name, properties = {}) {
  return Object.assign(document.createElement(name), properties);
}
