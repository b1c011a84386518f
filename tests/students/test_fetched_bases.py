"""Published bases that were fetched to models/, as they are: the zoo's figures, and every check before training."""

from __future__ import annotations

import pytest

from students.base_folder import is_repository, local_base
from students.preflight import preflight
from students.zoo import list_students
from teacher.models.load import read_facts

FETCHED = [
    student for student in list_students() if is_repository(student.base) and local_base(student.base) is not None
]


@pytest.mark.slow
@pytest.mark.skipif(not FETCHED, reason="no base of the Hub lies in models/")
@pytest.mark.parametrize("student", FETCHED, ids=lambda student: student.name)
def test_a_fetched_base_is_what_the_zoo_says_and_passes_preflight(student):
    folder = local_base(student.base)
    facts = read_facts(folder)
    assert (facts.model_type, facts.num_parameters) == (student.architecture, student.num_parameters)
    for method in ("distilled", "direct"):
        assert {finding.check for finding in preflight(student, method) if finding.state != "ok"} == set()
