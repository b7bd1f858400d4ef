"""Outputs that follow a choice, a regular expression, a JSON schema and a grammar, whatever the model would like to say.

The embedded model is small: what it writes has little sense, but it always has the form that was asked for.

python examples/24_structured_outputs.py [--model NAME]
"""

import argparse
import json
import re
from enum import StrEnum

from pydantic import BaseModel, Field

from kernel_core import LLM, SamplingParams

SQL = """
root ::= select_statement
select_statement ::= "SELECT " column " from " table " where " condition
column ::= "col_1 " | "col_2 "
table ::= "table_1 " | "table_2 "
condition ::= column "= " number
number ::= "1 " | "2 "
"""


class CarType(StrEnum):
    sedan, suv, truck, coupe = "sedan", "SUV", "Truck", "Coupe"


class Car(BaseModel):
    brand: str = Field(max_length=20)
    model: str = Field(max_length=20)
    car_type: CarType


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-chat")
    cases = {
        "choice": ("Classify this sentiment: this engine is wonderful!", {"choice": ["Positive", "Negative"]}, {}),
        "regex": (
            "An email address for Alan Turing, who works in Enigma.",
            {"regex": r"\w{1,12}@\w{1,12}\.com\n"},
            {"stop": ["\n"]},
        ),
        "json": ("The most iconic car of the 90s, as JSON.", {"json": Car.model_json_schema()}, {}),
        "grammar": ("An SQL query that shows col_1 of table_1 where it is 1.", {"grammar": SQL}, {}),
    }
    with LLM(parser.parse_args().model, plugins={"guided_decoding": {}}) as llm:
        prompts = [prompt for prompt, _, _ in cases.values()]
        params = [SamplingParams.of(max_tokens=100, structured_outputs=form, seed=1, **more) for _, form, more in cases.values()]
        texts = [output.outputs[0].text for output in llm.generate(prompts, params)]
    for name, text in zip(cases, texts):
        print(f"{name}: {text!r}")
    choice, email, car, query = texts
    assert choice in ("Positive", "Negative")
    assert re.fullmatch(r"\w+@\w+\.com", email)
    Car.model_validate(json.loads(car))
    assert re.fullmatch(r"SELECT col_[12]  from table_[12]  where col_[12] = [12] ", query)
    print("All four are valid.")


if __name__ == "__main__":
    main()
