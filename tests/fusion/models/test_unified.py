import torch
from torch.nn import functional as F


def test_paired_rows_are_predicted_by_the_fused_head_and_others_by_the_series(build, make_batch):
    model = build("unified").eval()
    batch = make_batch(present_cxr=[True, False, True, False])
    output = model(batch)
    ehr = model.ehr_encoder(batch.ehr, batch.lengths)
    torch.testing.assert_close(output.logits[1::2], model.ehr_head(ehr)[1::2])
    cxr = model.cxr_encoder(batch.cxr)
    fused = model.fused_head(torch.cat((ehr[0::2], model.projection(cxr)), 1))
    torch.testing.assert_close(output.logits[0::2], fused, atol=1e-5, rtol=1e-5)
    bce = F.binary_cross_entropy_with_logits
    expected = {
        "ehr": 4 * bce(model.ehr_head(ehr), batch.targets),
        "cxr": 2 * bce(model.cxr_head(cxr), batch.cxr_targets),
        "fused": 2 * bce(fused, batch.targets[0::2]),
    }
    assert output.terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(output.terms[name].sum, value, atol=1e-5, rtol=1e-5)


def test_the_task_loss_is_not_counted_twice(build):
    assert [phase.terms for phase in build("unified").phases] == [("ehr", "cxr", "fused")]
